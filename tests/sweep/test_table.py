import csv
import json

import pytest
from omegaconf import OmegaConf

from distill.report.leaderboard import sweep_rows
from distill.sweep.table import SweepTable


def write_job(folder, name, overrides, top1=None):
    (folder / name / ".hydra").mkdir(parents=True)
    (folder / name / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    if top1 is not None:
        student = {"top1": top1, "nll": 0.5, "ece": 0.1}
        summary = {"student": student, "validation": {"top1": top1}, "baseline": None, "seconds": 1}
        (folder / name / "summary.json").write_text(json.dumps(summary))


def finish(folder):
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}})
    SweepTable().on_multirun_end(config)


def test_jobs_are_rows_in_order_with_what_varies(tmp_path, capsys):
    for job in range(11):
        write_job(
            tmp_path, str(job), [f"objective.temperature={job}", "seed=0", "+tag=a=b"], job / 20
        )
    rows = sweep_rows(tmp_path)
    assert [row["job"] for row in rows] == [str(job) for job in range(11)]
    assert rows[3]["tag"] == "a=b"
    finish(tmp_path)
    printed = capsys.readouterr().out
    assert "objective.temperature" in printed
    assert "seed" not in printed  # shared by all
    with (tmp_path / "sweep.csv").open() as file:
        assert [float(row["test_top1"]) for row in csv.DictReader(file)] == [
            j / 20 for j in range(11)
        ]


def test_a_job_without_numbers_has_failed_and_so_has_the_sweep(tmp_path, capsys):
    write_job(tmp_path, "0", ["seed=0"], 0.5)
    write_job(tmp_path, "1", ["seed=1"])
    with pytest.raises(SystemExit) as stopped:
        finish(tmp_path)
    assert stopped.value.code == 2
    assert "failed" in capsys.readouterr().out


def test_no_cell_is_a_formula_and_numbers_stay_numbers(tmp_path):
    told = ["tag==1+1", "=x=2", "optimizer.lr=-1.5", "name=@x", "note=\t=1"]
    write_job(tmp_path, "0", told, 0.5)
    finish(tmp_path)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        head, row = csv.reader(file)
    cells = dict(zip(head, row, strict=True))
    assert cells["tag"] == "'=1+1"
    assert cells["optimizer.lr"] == "-1.5"
    assert cells["name"] == "'@x"
    assert cells["note"] == "'\t=1"
    assert not any(cell.startswith(("=", "@", "\t", "+")) for cell in (*head, *row))


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits_a_terminal_and_ends_with_the_winner_and_its_student(
    tmp_path, capsys, monkeypatch, width
):
    for number, top1 in enumerate((0.5, 0.75, 0.625)):
        told = [f"objective.temperature={number}", f"student.args.width={2**number}"]
        write_job(tmp_path, str(number), told, top1)
        (tmp_path / str(number) / "student").mkdir()
        path = tmp_path / str(number) / "summary.json"
        summary = json.loads(path.read_text())
        costs = {"params": 10**6 * 2**number, "flops": 10**8 * 2**number, "latency_ms": 1.5}
        summary["student"] |= costs | {"agreement": 0.9375}
        path.write_text(json.dumps(summary))
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(tmp_path.parent)
    finish(tmp_path)
    said = capsys.readouterr().out.splitlines()
    table = [line for line in said if line[:1] in "┏┃┡│└"]
    assert max(map(len, table)) <= width
    assert sum("0.7500" in line for line in table) == 1
    gone = next((line for line in said if line.startswith("no room for")), "")
    assert ("flops" in gone) == ("200000000" not in "".join(table))
    assert "…" not in "".join(table)
    assert said[-2].startswith("best on validation: job 1 (objective.temperature=1, student.args.")
    assert said[-2].endswith("val top1 0.7500, test top1 0.7500")
    assert said[-1] == f"{tmp_path.name}/1/student"
    with (tmp_path / "sweep.csv").open() as file:
        assert [row["params"] for row in csv.DictReader(file)] == ["1000000", "2000000", "4000000"]


def test_jobs_that_tie_are_named_and_costs_of_one_student_are_in_the_file_only(tmp_path, capsys):
    for job in ("0", "1"):
        write_job(tmp_path, job, [f"seed={job}"], 0.5)
    finish(tmp_path)
    said = capsys.readouterr().out
    assert "job 0 (seed=0), val top1 0.5000, test top1 0.5000; job 1 ties with it" in said
    assert "params" not in said
