import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cai_ray.errors import DataError
from cai_ray.models.checkpoints import load_causal_lm, load_scalar_model, save_pretrained
from cai_ray.models.documents import document_scores, document_states, lm_head
from cai_ray.models.tokenization import Tokenizer, preference_input

PROMPTS = ["Hello?", "How do plants grow in the dark, and for how long?", "Why"]
ANSWERS = ["Yes.", "They do not. <|im_end|> They wait.", "Because it is so, and has been so for as long as we know."]


@pytest.fixture(scope="module")
def scalar(tiny):
    model = load_scalar_model(tiny, "float32", seed=1)
    with torch.no_grad():
        model.score.weight.mul_(20)  # scores of order 1 and more
    return model.eval()


@pytest.fixture(scope="module")
def rows(tiny):
    tok = Tokenizer.load(tiny)
    return [
        preference_input(tok.prompt([{"role": "user", "content": p}]), tok.response(a), tok.eos_id, 500)
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]


def pad(rows, pad_id, left=False):
    width = max(map(len, rows))
    fills = [width - len(r) for r in rows]
    ids = [[pad_id] * n + r if left else r + [pad_id] * n for r, n in zip(rows, fills, strict=True)]
    mask = [[0] * n + [1] * len(r) if left else [1] * len(r) + [0] * n for r, n in zip(rows, fills, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def in_a_row(model, rows):
    return document_scores(model, torch.tensor([[i for row in rows for i in row]]), list(map(len, rows)))


@torch.no_grad()
def test_scores_equal_transformers_logits_padded_either_way(scalar, rows, tiny, tmp_path):
    save_pretrained(scalar.state_dict().items(), scalar.config, Tokenizer.load(tiny), tmp_path / "pm")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pm").eval()
    scores = in_a_row(scalar, rows)
    assert scores.dtype == torch.float32
    assert scores.std() > 0.1  # else the comparison would prove nothing
    for left in (False, True):
        padded, attention = pad(rows, theirs.config.pad_token_id, left)
        logits = theirs(input_ids=padded, attention_mask=attention).logits[:, 0]
        assert torch.allclose(scores, logits, atol=1e-5, rtol=0)
    one_by_one = torch.stack([theirs(input_ids=torch.tensor([r])).logits[0, 0] for r in rows])
    assert torch.allclose(scores, one_by_one, atol=1e-5, rtol=0)


@torch.no_grad()
def test_with_padding_equal_to_eos_transformers_would_read_one_token_early(scalar, rows, tiny):
    theirs = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).eval()
    theirs.load_state_dict(scalar.state_dict())
    assert theirs.config.pad_token_id == rows[0][-1]
    early = theirs(input_ids=torch.tensor([rows[0]])).logits[0, 0]
    assert torch.allclose(early, in_a_row(scalar, [rows[0][:-1]])[0], atol=1e-5)
    assert not torch.allclose(early, in_a_row(scalar, [rows[0]])[0], atol=1e-3)


@torch.no_grad()
def test_heads_run_in_float32_in_a_bfloat16_model(tiny, rows):
    model = load_scalar_model(tiny, "bfloat16", seed=1).eval()
    last = [model.base_model(torch.tensor([row]))[0][0, -1] for row in rows]
    assert last[0].dtype == torch.bfloat16
    expected = (torch.stack(last).double() @ model.score.weight.double().T)[:, 0]
    assert torch.allclose(in_a_row(model, rows).double(), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_hidden_states_times_the_head_are_the_logits_and_the_head_itself_does_not_run(tiny, rows):
    model = load_causal_lm(tiny, "float32").eval()
    ids, mask = pad(rows, 0)
    logits = model(input_ids=ids, attention_mask=mask).logits
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the vocabulary projection ran"))
    real = mask.bool()
    for packed in (True, False):
        factor, weight = lm_head(model, document_states(model, ids[real][None], list(map(len, rows)), packed))
        assert factor.shape == (int(real.sum()), 64)
        assert torch.allclose(factor @ weight.T, logits[real], atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_moves_nothing_where_positions_are_absolute():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
    together = document_states(model, torch.tensor([[i for row in rows for i in row]]), list(map(len, rows)))
    alone = [model.transformer(input_ids=torch.tensor([row]))[0][0] for row in rows]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_models_whose_logits_are_more_than_a_product_are_refused():
    hidden = torch.randn(3, 8)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    assert lm_head(model, hidden) == (hidden, model.lm_head.weight)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(DataError, match="final_logit_softcapping"):
        lm_head(model, hidden)
    model.config.final_logit_softcapping = None
    model.config.logit_scale = 1.0
    assert lm_head(model, hidden) == (hidden, model.lm_head.weight)


def test_a_bias_of_the_head_is_a_column_with_its_gradient():
    head, hidden = nn.Linear(4, 6), torch.randn(3, 4)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=6, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    model.lm_head = head
    factor, weight = lm_head(model, hidden)
    assert torch.allclose(factor @ weight.T, head(hidden), atol=1e-6, rtol=0)
    (factor @ weight.T).sum().backward()
    assert torch.equal(head.bias.grad, torch.full((6,), 3.0))
