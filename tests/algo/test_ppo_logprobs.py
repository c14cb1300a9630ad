"""The chunked head against hand-worked values and against the plain reference, in values and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cai_ray.algo.ppo import logprobs_from_hidden, logprobs_from_logits
from cai_ray.errors import CaiError

LN3 = math.log(3)
close = torch.testing.assert_close


def draw(seed, n, hidden, vocabulary, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, hidden, generator=generator).to(dtype).requires_grad_(),
        torch.randn(vocabulary, hidden, generator=generator).to(dtype).requires_grad_(),
        torch.randint(vocabulary, (n,), generator=generator),
        torch.randn(n, generator=generator),
        torch.randn(n, generator=generator),
    )


def reference(hidden, weight, labels, temperature):
    """Log-probs and entropies by plain autograd over all logits."""
    logits = hidden @ weight.T
    logprobs = torch.log_softmax(logits.float() / temperature, -1)
    return logprobs_from_logits(logits, labels, temperature), -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize(("temperature", "probability"), [(1.0, 1 / 4), (0.5, 1 / 10), (2.0, 1 / (1 + math.sqrt(3)))])
def test_temperature_divides_the_logits(temperature, probability):
    logits = torch.tensor([[[0.0, LN3]]])  # odds of 1 to 3, to the power of 1/temperature
    labels = torch.tensor([[0]])
    close(logprobs_from_logits(logits, labels, temperature), torch.tensor([[math.log(probability)]]))
    got, entropy = logprobs_from_hidden(torch.ones(1, 1), torch.tensor([[0.0], [LN3]]), labels[0], temperature)
    close(got, torch.tensor([math.log(probability)]))
    p = probability
    close(entropy, torch.tensor([-p * math.log(p) - (1 - p) * math.log(1 - p)]))


def test_each_token_has_its_own_label():
    logits = torch.tensor([[[0.0, LN3], [LN3, 0.0], [0.0, 0.0]], [[LN3, 0.0], [0.0, LN3], [0.0, LN3]]])
    wanted = torch.tensor([[1 / 4, 1 / 4, 1 / 2], [3 / 4, 3 / 4, 1 / 4]]).log()
    close(logprobs_from_logits(logits, torch.tensor([[0, 1, 1], [0, 1, 0]])), wanted)


def test_gradients_by_hand():
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[0.0], [LN3]], requires_grad=True)
    logprobs, entropy = logprobs_from_hidden(hidden, weight, torch.tensor([0]), temperature=0.5)
    # p = (0.1, 0.9): d logprob / d logits = (1 - 0.1, -0.9) / 0.5
    logprobs.backward(retain_graph=True)
    close(weight.grad, torch.tensor([[1.8], [-1.8]]))
    close(hidden.grad, torch.tensor([[-1.8 * LN3]]))
    hidden.grad = weight.grad = None
    # d entropy / d logits = -p (ln p + entropy) / 0.5 = ±0.09 · ln 9 / 0.5 = ±0.36 ln 3, towards the unlikely token
    entropy.backward()
    close(weight.grad, torch.tensor([[0.36 * LN3], [-0.36 * LN3]]))
    close(hidden.grad, torch.tensor([[-0.36 * LN3**2]]))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(0, 23),
    st.sampled_from([1, 3, 7, 64]),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.sampled_from(["logprobs", "entropy", "both"]),
)
def test_chunks_agree_with_the_plain_reference(seed, n, chunk, temperature, used):
    hidden, weight, labels, a, b = draw(seed, n, 6, 37)
    results = []
    for logprobs, entropy in (
        reference(hidden, weight, labels, temperature),
        logprobs_from_hidden(hidden, weight, labels, temperature, chunk),
    ):
        loss = {"logprobs": logprobs * a, "entropy": entropy * b, "both": logprobs * a + entropy * b}[used].sum()
        results.append((logprobs, entropy, *torch.autograd.grad(loss, (hidden, weight))))
    close(results[1], results[0], atol=2e-5, rtol=2e-5)
    assert results[1][0].shape == (n,)


def test_a_bfloat16_head_keeps_its_dtype_and_the_softmax_is_float32():
    hidden, weight, labels, a, b = draw(3, 20, 16, 50, torch.bfloat16)
    results = []
    for logprobs, entropy in (
        reference(hidden, weight, labels, 0.7),
        logprobs_from_hidden(hidden, weight, labels, 0.7, 8),
    ):
        assert logprobs.dtype == entropy.dtype == torch.float32
        results.append((logprobs, entropy, *torch.autograd.grad((logprobs * a + entropy * b).sum(), (hidden, weight))))
    close(results[1][:2], results[0][:2], atol=1e-6, rtol=1e-6)  # the logits are the same bfloat16 numbers
    close(results[1][2:], results[0][2:], atol=0.05, rtol=0.02)  # gradients are rounded to bfloat16, in another order
    assert [grad.dtype for grad in results[1][2:]] == [torch.bfloat16] * 2


def test_float32_hidden_states_meet_the_head_in_the_heads_dtype():
    hidden, weight, labels, *_ = draw(4, 9, 16, 50)
    low = weight.detach().bfloat16()
    logprobs, _ = logprobs_from_hidden(hidden, low, labels, chunk=4)
    close(logprobs, reference(hidden.bfloat16(), low, labels, 1.0)[0])
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert grad.dtype == torch.float32


def test_extreme_logits_stay_finite():
    hidden, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [1e4], [-1e4]])
    logprobs, entropy = logprobs_from_hidden(hidden, weight, torch.tensor([2]))
    assert logprobs.item() == -2e4
    assert entropy.item() == 0
    (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), hidden)
    close(grad, torch.tensor([[-2e4]]))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_asks_for_a_gradient_gets_one(frozen):
    hidden, weight, labels, *_ = draw(5, 10, 4, 11)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    logprobs_from_hidden(hidden, weight, labels, chunk=3)[0].sum().backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")
    with torch.no_grad():
        assert not logprobs_from_hidden(hidden, weight, labels)[0].requires_grad


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns, and counts softmaxes."""

    elements, softmaxes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.softmaxes += "log_softmax" in str(function)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_is_as_large_as_all_logits():
    hidden, weight, labels, a, b = draw(6, 64, 8, 512)
    with Largest() as plain:
        (reference(hidden, weight, labels, 1.0)[0] * a).sum().backward()
    with Largest() as chunked:
        logprobs, entropy = logprobs_from_hidden(hidden, weight, labels, chunk=4)
        (logprobs * a + entropy * b).sum().backward()
    assert plain.elements == 64 * 512
    assert chunked.elements == 512 * 8  # the weight and its gradient; a chunk has 4 · 512
    with Largest() as default:
        logprobs_from_hidden(hidden, weight, labels)
    assert default.elements == 64 * 512  # a chunk longer than the tokens takes no more than they do


def test_the_backward_pass_computes_all_chunks_again_but_the_last():
    hidden, weight, labels, a, b = draw(8, 10, 8, 32)
    logprobs, entropy = logprobs_from_hidden(hidden, weight, labels, chunk=4)
    loss, found = (logprobs * a + entropy * b).sum(), []
    for softmaxes in (2, 3):  # of tokens 0 and 1, and 2 to 5; what was kept is spent after the first pass
        with Largest() as again:
            found.append(torch.autograd.grad(loss, (hidden, weight), retain_graph=True))
        assert again.softmaxes == softmaxes
    close(found[1], found[0], atol=0, rtol=0)


def test_the_temperature_is_1_unless_given():
    hidden, weight, labels, *_ = draw(7, 5, 4, 11)
    close(logprobs_from_hidden(hidden, weight, labels), reference(hidden, weight, labels, 1.0))
    logits = hidden @ weight.T
    close(logprobs_from_logits(logits, labels), logprobs_from_logits(logits, labels, 1.0))


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"chunk": 0}, {"labels": 3}, {"weight": 5}])
def test_misuse_is_refused(change):
    labels, weight = torch.zeros(change.pop("labels", 2), dtype=torch.long), torch.zeros(7, change.pop("weight", 4))
    with pytest.raises(CaiError, match="hidden"):
        logprobs_from_hidden(torch.zeros(2, 4), weight, labels, **change)
