"""`llmnorm compare`, with train.py replaced by a stand-in whose losses are known."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from compare_cases import STAND_IN, call, loss_of, stop_when, write_study

from llmnorm.evaluation import compare_runs
from llmnorm.evaluation.compare_statistics import estimate, paired

RATES = [1e-3, 3e-3, 1e-2]
SEEDS = (1, 2, 3)


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(compare_runs, "TRAIN", script)
    return script


def run(folder: Path, study: Path, *words: str) -> dict[str, Any]:
    assert call(study, "--output_dir", folder, *words) == 0
    return json.loads((folder / "results.json").read_text())


def row(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in results["variants"] if row["name"] == name)


def starts(folder: Path) -> dict[str, int]:
    """How often each run was started, by its folder."""
    return {str(p.parent.relative_to(folder)): len(p.read_text()) for p in folder.rglob("starts")}


def test_the_best_rate_then_paired_seeds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    variants = {"plain": {}, "decayed": {"optimizer": {"weight_decay": 0.1}}}
    results = run(out, write_study(tmp_path, variants, lrs=RATES))
    log = capsys.readouterr().out
    assert "[1/6] plain lr 0.001 sweep: loss " in log
    assert results["warnings"] == results["not_run"] == []
    assert results["settings"]["seeds"] == list(SEEDS)

    plain, decayed = row(results, "plain"), row(results, "decayed")
    expected = {
        name: {seed: loss_of(3e-3, decay, seed) for seed in SEEDS}
        for name, decay in (("plain", 0.0), ("decayed", 0.1))
    }
    for own, name in ((plain, "plain"), (decayed, "decayed")):
        assert (own["lr"], own["lr_at_edge"], own["steps"]) == (3e-3, None, 20)
        assert {one["seed"]: one["loss"] for one in own["runs"]} == pytest.approx(expected[name])
        assert own["loss"] == pytest.approx(estimate(list(expected[name].values())).to_dict())
        assert own["peak_memory_gib"] == 0.5
    assert [point["loss"] for point in plain["sweep"]] == pytest.approx([loss_of(lr, 0, 0) for lr in RATES])
    difference, p = paired(expected["decayed"], expected["plain"])
    assert decayed["difference"] == pytest.approx({**difference.to_dict(), "p": p, "p_holm": p})
    assert "difference" not in plain
    assert (plain["tokens_per_second"], decayed["tokens_per_second"]) == pytest.approx((640, 320))
    assert (plain["optimizer_seconds"], decayed["optimizer_seconds"]) == pytest.approx((0.01, 0.02))
    assert plain["runs"][0]["curve"] == [
        [step, pytest.approx(loss_of(3e-3, 0, 1) + (20 - step) / 20)] for step in (5, 10, 15, 20)
    ]
    assert set(starts(out).values()) == {1}
    assert len(starts(out)) == 2 * (len(RATES) + len(SEEDS))


def test_table_plot_and_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    variants = {"plain": {}, "decayed": {"optimizer": {"weight_decay": 0.1}}}
    run(out, write_study(tmp_path, variants, lrs=RATES))
    capsys.readouterr()
    markdown = (out / "table.md").read_text()
    first = next(line for line in markdown.splitlines() if line.startswith("| **plain**"))
    assert "| 0.003 | 3.03" in first
    assert "| tokens/s | optimizer ms | peak GiB |" in markdown and first.endswith("| 640 | 10 | 0.50 |")
    second = next(line for line in markdown.splitlines() if line.startswith("| decayed"))
    assert second.split(" | ")[-4] == "worse" and "+0.1" in second
    assert "Model 1 x 32, 4 x 16 tokens per step, fp32, text .../text.txt." in markdown
    assert str(tmp_path) not in markdown + (out / "results.json").read_text(), "no folder of this machine"
    svg = (out / "plot.svg").read_text()
    root = ElementTree.fromstring(svg)
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert sum(c.get("class") == "seed" for c in circles) == 6
    assert sum(c.get("class") == "mean" for c in circles) == 2
    paths = list(root.iter("{http://www.w3.org/2000/svg}path"))
    assert sum(p.get("class") == "line faint" for p in paths) == 6, "each seed's curve"
    assert sum(p.get("class") == "line" for p in paths) == 2, "the means"
    page = (out / "report.html").read_text()
    assert svg.strip() in page and "A &lt;small&gt; study" in page and "<script" not in page

    assert call("--render", out / "results.json") == 0
    assert capsys.readouterr().out == markdown
    doc = tmp_path / "page.md"
    doc.write_text("before\n<!-- compare: results -->\nold\n<!-- end of results -->\nafter\n")
    assert call("--render", out / "results.json", "--into", doc) == 0
    assert doc.read_text() == (
        f"before\n<!-- compare: results -->\n{markdown}<!-- end of results -->\nafter\n"
    )
    for name in ("table.md", "plot.svg", "report.html"):
        (out / name).rename(tmp_path / name)
    assert call("--render", out / "results.json", "--output_dir", out) == 0
    assert (out / "plot.svg").read_text() == svg and (out / "report.html").read_text() == page


def test_gradient_norms_are_shown_where_the_study_asks_for_them(tmp_path: Path) -> None:
    variants = {"plain": {}, "decayed": {"optimizer": {"weight_decay": 0.1}}}  # has one norm of 30 among 2s
    without = run(tmp_path / "without", write_study(tmp_path, variants, lrs=RATES))
    assert "gradient norm" not in (tmp_path / "without" / "table.md").read_text()
    assert "gradient_norm" not in row(without, "decayed")
    out = tmp_path / "out"
    results = run(out, write_study(tmp_path, variants, lrs=RATES, gradient_norms=True))
    expected = {"median": 2.0, "largest": 30.0, "largest_ratio": 15.0, "spikes": 3, "not_finite": 0}
    assert row(results, "decayed")["gradient_norm"] == expected, "one spike for each of three seeds"
    assert row(results, "plain")["gradient_norm"]["spikes"] == 0
    one = row(results, "decayed")["runs"][0]["gradient_norm"]
    assert one["curve"] == [[step, 30.0 if step == 15 else 2.0] for step in range(1, 21)]
    swept = row(results, "decayed")["sweep"][0]["gradient_norm"]
    assert swept["spikes"] == 0 and swept["largest"] == 2.0, "a sweep has 10 steps"
    markdown = (out / "table.md").read_text()
    lines = {line.split(" | ")[0]: line for line in markdown.splitlines()}
    assert lines["| decayed"].endswith("| 2 | 30 | 15.00 | 3 |")
    assert lines["| **plain**"].endswith("| 2 | 2 | 1.00 | 0 |")
    assert "above 10 (spikes)" in markdown
    plot = (out / "plot.svg").read_text()
    paths = list(ElementTree.fromstring(plot).iter("{http://www.w3.org/2000/svg}path"))
    assert "Gradient norm" in plot
    assert sum(p.get("class") == "line faint" for p in paths) == 12, "of each seed loss and norm"


def test_results_of_runs_without_gradient_norms_are_rendered(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = write_study(tmp_path, PAIR, lrs=[3e-3], gradient_norms=True)
    run(out, study)
    outcome = out / "runs/seeds/b/lr_0.003/seed_1/outcome.json"
    old = {key: value for key, value in json.loads(outcome.read_text()).items() if key != "gradient_norm"}
    outcome.write_text(json.dumps(old))
    results = run(out, study)
    assert row(results, "b")["gradient_norm"]["spikes"] == 2, "of the two runs that have it"
    assert "gradient_norm" not in row(results, "b")["runs"][0]


def test_finished_runs_are_kept_and_more_may_be_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = write_study(tmp_path, {"a": {}, "b": {"optimizer": {"weight_decay": 0.1}}}, lrs=RATES[:2])
    first = run(out, study)
    assert [warning.split(";")[0] for warning in first["warnings"]] == [
        f"{name}: the best learning rate 0.003 is the highest that was tried" for name in "ab"
    ]
    before = starts(out)
    more = {"a": {}, "b": {"optimizer": {"weight_decay": 0.1}}, "c": {"optimizer": {"weight_decay": 0.2}}}
    study = write_study(tmp_path, more, lrs=RATES)
    second = run(out, study, "--seeds", "4")
    assert second["warnings"] == []
    after = starts(out)
    assert {key: after[key] for key in before} == before, "nothing was trained twice"
    assert len(after) == 3 * (3 + 4)
    assert [one["seed"] for one in row(second, "a")["runs"]] == [1, 2, 3, 4]
    assert row(second, "a")["runs"][:3] == row(first, "a")["runs"]


def test_a_failure_is_listed_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    variants = {
        "good": {},
        "half": {"train": {"sample_prompt": "fail"}},  # above 0.002
        "lost": {"train": {"sample_prompt": "nan"}},
        "killed": {"train": {"sample_prompt": "kill"}, "lrs": [3e-3]},
    }
    study = write_study(tmp_path, variants, lrs=[1e-3, 3e-3])
    results = run(out, study)
    reasons = {entry["run"]: (entry["status"], entry["reason"]) for entry in results["not_run"]}
    status, reason = reasons.pop("half lr 0.003 sweep")
    assert status == "failed" and reason.startswith("out of memory in .../lr_0.003")
    assert reasons.pop("lost lr 0.001 sweep") == ("failed", "the final held-out loss is not finite")
    assert reasons["lost seed 1"] == ("failed", "no learning rate finished the sweep")
    assert reasons["killed lr 0.003 seed 2"] == ("interrupted", "stopped or killed after step 3 of 20")
    assert row(results, "half")["lr"] == 1e-3 and row(results, "half")["loss"]["n"] == 3
    assert row(results, "good")["loss"]["n"] == 3
    assert row(results, "lost")["loss"]["mean"] is None
    assert "killed by SIGKILL after step 3" in capsys.readouterr().out
    assert "half lr 0.003 sweep: failed: out of memory" in (out / "table.md").read_text()
    ElementTree.fromstring((out / "plot.svg").read_text())

    before = starts(out)
    assert call(study, "--output_dir", out, "--list") == 0
    listed = capsys.readouterr().out
    assert "killed lr 0.003 seed 2: interrupted" in listed and "good" not in listed.split("finished", 1)[1]
    assert starts(out) == before, "--list starts nothing"

    again = run(out, study)
    changed = {key for key, number in starts(out).items() if number != before.get(key)}
    assert changed == {f"runs/seeds/killed/lr_0.003/seed_{seed}" for seed in SEEDS}, "failed runs rest"
    assert row(again, "killed")["loss"]["n"] == 3
    run(out, study, "--retry-failed")
    assert starts(out)["runs/sweep/half/lr_0.003"] == 1, "and began from nothing when asked to"


def test_equal_time_scales_steps_by_measured_step_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    variants = {"fast": {}, "slow": {"optimizer": {"weight_decay": 0.1}}}  # 0.1 and 0.2 s per step
    study = write_study(tmp_path, variants, lrs=RATES, equal="time")
    results = run(out, study)
    assert (row(results, "fast")["steps"], row(results, "slow")["steps"]) == (20, 10)
    assert "| slow | 0.003 | 10 |" in (out / "table.md").read_text()
    assert json.loads((out / "state.json").read_text())["timed_steps"] == {"fast": 20, "slow": 10}


def test_equal_tokens_scales_steps_by_batch(tmp_path: Path) -> None:
    variants = {"small": {}, "large": {"train": {"global_batch_size": 8}}}
    results = run(tmp_path / "out", write_study(tmp_path, variants, lrs=[3e-3]))
    assert (row(results, "small")["steps"], row(results, "large")["steps"]) == (20, 10)
    assert results["warnings"] == [
        "large reads other batches than small, so its seeds are paired by number, not by data"
    ]
    assert row(results, "small")["sweep"] == [], "a single rate needs no sweep"


def test_run_configs_are_variants_and_one_seed_has_no_interval(tmp_path: Path) -> None:
    study = write_study(tmp_path, {})
    base = (study.parent / "base.yaml").read_text()
    for name, norm in (("pre", "pre_ln"), ("post", "post_ln")):
        changed = base.replace("model:\n", f"model:\n  norm: {norm}\n")
        (tmp_path / f"{name}.yaml").write_text(changed)
    files = [str(tmp_path / "pre.yaml"), str(tmp_path / "post.yaml")]
    words = ["--lrs", "3e-3", "--steps", "5", "--seeds", "1", "--no-interval", "--jobs", "2"]
    words += ["--set", "evaluation.every=null", "seed=10"]
    assert call(*files, "--output_dir", tmp_path / "out", *words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row(results, "post")["changes"] == {"model.norm": "post_ln"}
    assert [one["seed"] for one in row(results, "pre")["runs"]] == [11]
    assert "difference" not in row(results, "post")
    markdown = (tmp_path / "out" / "table.md").read_text()
    assert "interval |" not in markdown and "nothing is said about chance" in markdown


def test_a_stop_reaches_the_runs_and_the_next_call_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    study = write_study(tmp_path, {"a": {}, "b": {"train": {"sample_prompt": "sleep"}}}, lrs=[3e-3])
    second_call: list[int] = []

    def meanwhile() -> None:
        second_call.append(call(study, "--output_dir", out))

    with stop_when((out / "runs/seeds/b/lr_0.003/seed_1/slept").exists, meanwhile):
        assert call(study, "--output_dir", out) == 1
    log = capsys.readouterr()
    assert second_call == [2] and "is in use: another llmnorm compare works there" in log.err
    assert "b lr 0.003 seed 1: killed by SIGTERM after step 0 of 20" in log.out
    assert "start the same command again to go on" in log.out
    assert len(json.loads((out / "results.json").read_text())["not_run"]) == 5, "all but a, seed 1"
    for seed in (2, 3):
        folder = out / f"runs/seeds/b/lr_0.003/seed_{seed}"
        folder.mkdir(parents=True)
        (folder / "slept").touch()
    assert run(out, study)["not_run"] == []
    assert starts(out)["runs/seeds/a/lr_0.003/seed_1"] == 1
    assert starts(out)["runs/seeds/b/lr_0.003/seed_1"] == 2


PAIR = {"a": {}, "b": {"optimizer": {"weight_decay": 0.1}}}


@pytest.mark.parametrize(
    ("variants", "keys", "words", "expected"),
    [
        (PAIR, {"step": 3}, [], "step is not a key of a study; it takes .* did you mean steps"),
        ({"a": {}}, {}, [], "gives 1 variant, and a comparison needs two"),
        (PAIR, {"gradient_norms": 3}, [], "gradient_norms=3 must be true or false"),
        (PAIR, {"seeds": 1}, [], "no spread to make an interval from; give --seeds 3, or --no-interval"),
        (PAIR, {}, ["--lrs", "1e-3", "-1"], "must be learning rates greater than 0"),
        (PAIR, {"lrs": [1e-3, 1e-3]}, [], "a learning rate twice"),
        (PAIR, {"lrs": "fast"}, [], "must be learning rates greater than 0"),
        (PAIR, {"sweep_steps": 0}, [], "sweep_steps=0 must be an integer of at least 1"),
        (PAIR, {"equal": "memory"}, [], "equal='memory' must be tokens or time"),
        (PAIR, {"baseline": "c"}, [], "baseline=c is not a variant; choose one of a, b"),
        (PAIR, {"base": "absent.yaml"}, [], "there is no such file"),
        (PAIR, {}, ["--set", "train.max_steps=3"], "the comparison decides train.max_steps; give --steps"),
        (PAIR, {}, ["--set", "optimizer.weight_decay=0"], "contradicts variant b, which sets it to 0.1"),
        (
            PAIR,
            {},
            ["--set", "data.validation_fraction=0", "evaluation.every=null"],
            "leaves nothing to compare on",
        ),
        (PAIR, {}, ["--set", "train.max_stepz=0"], "did you mean train.max_steps"),
        ({**PAIR, "c": {"optimizer": {"lr": 1}}}, {}, [], "the comparison decides optimizer.lr"),
        ({**PAIR, "c": {"model": {"norm": "mix"}}}, {}, [], "variant c: .*model.norm"),
        ({**PAIR, "c": {"model": {"norm": "mix_ln", "norm_options": {"x": 1}}}}, {}, [], "variant c: .*x"),
        ({**PAIR, "../c": {}}, {}, [], "cannot name a variant"),
        ({**PAIR, "c": {"data": {"sequence_length": 8}}}, {}, [], "evaluation.context_length=8 is 16 in a"),
        (
            {**PAIR, "c": {"schedule": {"name": "wsd", "decay_steps": 4}}},
            {"sweep_steps": 3},
            [],
            "c, run of 3",
        ),
    ],
)
def test_bad_input_is_one_paragraph_and_writes_nothing(
    variants: dict[str, Any],
    keys: dict[str, Any],
    words: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    study = write_study(tmp_path, variants, **keys)
    assert call(study, "--output_dir", tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(expected, error), error
    assert not (tmp_path / "out").exists()


def test_other_folders_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    study = write_study(tmp_path, PAIR, lrs=[3e-3])
    assert call("--output_dir", tmp_path / "out") == 2
    assert "needs what it is to compare" in capsys.readouterr().err
    assert call(study) == 2
    assert "--output_dir is required" in capsys.readouterr().err
    assert call(study, study, "--output_dir", tmp_path / "out") == 2
    assert "is a study, which holds its variants" in capsys.readouterr().err
    assert call(study, "--output_dir", tmp_path) == 2
    assert "holds something that is not a comparison" in capsys.readouterr().err
    assert call("--help") == 0
    assert "usage: llmnorm compare" in capsys.readouterr().out
    assert call("--render", study) == 2
    assert "does not hold the results of a comparison" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", study)
    before = starts(tmp_path / "out")
    capsys.readouterr()
    for words, expected in (
        (["--steps", "30"], "steps was 20 and is now 30"),
        (["--set", "model.hidden_size=64"], "model.hidden_size of a was 32 and is now 64"),
    ):
        assert call(study, "--output_dir", tmp_path / "out", *words) == 2
        assert expected in capsys.readouterr().err
    other = write_study(tmp_path, {"x": {}, "y": {}}, lrs=[3e-3])
    assert call(other, "--output_dir", tmp_path / "out") == 2
    assert "variants was 'a, b' and is now 'x, y'" in capsys.readouterr().err
    assert starts(tmp_path / "out") == before
    assert call("--render", tmp_path / "out" / "results.json", "--into", study) == 2
    assert "lacks the lines <!-- compare: results -->" in capsys.readouterr().err
