"""A checkpoint counts only whole, and the newest whole one is taken."""

import json

from cai_ray.artifacts import StageDir
from cai_ray.rl.checkpoints import commit_checkpoint, go_back, last_checkpoint


def fill(folder, content="weights"):
    for role in ("actor", "critic"):
        (folder / role).mkdir(parents=True)
        (folder / role / "part.pt").write_text(content)
    return folder


def test_a_folder_without_manifest_does_not_count(tmp_path):
    assert last_checkpoint(tmp_path) is None
    fill(tmp_path / "step-4")
    assert last_checkpoint(tmp_path) is None


def test_a_checkpoint_with_a_cut_or_missing_file_does_not_count(tmp_path):
    whole = fill(tmp_path / "step-2")
    commit_checkpoint(whole, {"step": 2})
    later = fill(tmp_path / "step-10")
    keep = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    commit_checkpoint(later, {"step": 10})
    for path, content in keep.items():  # as after a crash between the manifest and the removal of older ones
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert last_checkpoint(tmp_path)[0] == later  # by number: as text, step-2 would come after step-10
    (later / "critic" / "part.pt").write_text("weig")
    folder, state = last_checkpoint(tmp_path)
    assert (folder, state["step"]) == (whole, 2)
    (whole / "actor" / "part.pt").unlink()
    assert last_checkpoint(tmp_path) is None


def test_a_new_checkpoint_removes_older_ones_and_used_rollouts_only(tmp_path):
    commit_checkpoint(fill(tmp_path / "step-2"), {"step": 2, "kl_coef": 0.5})
    for step in (2, 3, 4):
        (tmp_path / f"rollouts-{step}.parquet").write_text("")
    for step in (3, 4):  # what engines were sent
        (tmp_path / f"adapter-5ee0a1b2-{step}").mkdir()
    commit_checkpoint(fill(tmp_path / "step-4"), {"step": 4, "kl_coef": 0.5})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter-5ee0a1b2-4", "rollouts-4.parquet", "step-4"]
    assert last_checkpoint(tmp_path)[1]["kl_coef"] == 0.5


def test_lines_of_steps_that_are_taken_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "x": f"{s}\u2028 and \x85"}, ensure_ascii=False) + "\n" for s in range(5)]
    path.write_text("".join(lines) + '{"step": 1, "x"')  # the last one was cut off
    StageDir(tmp_path).forget_from(3)  # where samples.jsonl does not exist
    assert path.read_text() == "".join(lines[:3])


def test_the_checkpoint_before_can_be_kept_and_gone_back_to(tmp_path):
    for step in (2, 4, 6):
        (tmp_path / f"rollouts-{step}.parquet").write_text("rows")
        commit_checkpoint(fill(tmp_path / f"step-{step}"), {"step": step, "kl_coef": 0.25}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("rollouts-4.parquet", "rollouts-6.parquet", "step-4", "step-6"),
    ]
    assert not go_back(tmp_path, 4)
    assert last_checkpoint(tmp_path)[1]["step"] == 6  # nothing was lost by asking
    assert go_back(tmp_path, 6)
    folder, state = last_checkpoint(tmp_path)
    assert (folder.name, state["step"], state["kl_coef"]) == ("step-4", 4, 0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rollouts-4.parquet", "step-4"]


def test_a_model_that_was_half_written_is_no_output(tmp_path):
    for folder in ("snapshots/step-2", "snapshots/.step-4-abc/new"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").write_bytes(b"x")
    assert [entry["path"] for entry in StageDir(tmp_path).outputs()] == ["snapshots/step-2/model.safetensors"]


def test_a_later_folder_that_was_never_finished_costs_no_checkpoint(tmp_path):
    fill(tmp_path / "step-6")
    commit_checkpoint(fill(tmp_path / "step-5"), {"step": 5})
    assert last_checkpoint(tmp_path)[1]["step"] == 5
