"""The page stands alone, holds no markup of others, and is there in seconds; the commands say what went wrong."""

from __future__ import annotations

import base64
import csv
import gc
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bs_exp.records.record import FILE_NAME, Status, read_record, write_record
from bs_exp.records.stages import Stage, evaluated_model
from bs_exp.records.sweep import SweepPlan, SweepPoint
from bs_exp.reporting.report import write_figures, write_report
from tests.support import synthetic

Cli = Callable[..., Any]
EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Page(HTMLParser):
    """What a page is made of: tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.words.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def all(self, attribute: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(attribute)) is not None]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 25 records, two of them failed, and their report."""
    folder = synthetic.write(synthetic.study(25), tmp_path_factory.mktemp("sweep"))
    write_report([folder], folder / "report")
    return folder


@pytest.fixture(scope="module")
def page(sweep: Path) -> Page:
    return Page((sweep / "report" / "index.html").read_text(encoding="utf-8"))


def _page(folder: Path) -> Page:
    written = write_report([folder], folder / "report")
    return Page((written.folder / "index.html").read_text(encoding="utf-8"))


def test_two_hundred_records_take_less_than_three_times_fifty(tmp_path_factory: pytest.TempPathFactory) -> None:
    seconds = []
    for records in (50, 200):
        tmp_path = tmp_path_factory.mktemp("records")
        synthetic.write(synthetic.study(records, layers=32), tmp_path)
        start = time.process_time()
        written = write_report([tmp_path], tmp_path / "report")
        seconds.append(time.process_time() - start)
    assert seconds[1] < 3.0 * seconds[0]
    assert gc.isenabled()
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert len(written.study.points) == 200
    assert {f"run-{i}" for i in range(1, 201)} <= set(page.all("id"))
    with (tmp_path / "report" / "tables" / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 200
    assert sum(row["status"] == "failed" for row in rows) == 10


def test_the_page_needs_nothing_else(sweep: Path, page: Page) -> None:
    links = [*page.all("href"), *page.all("src"), *page.all("xlink:href")]
    others = {link for link in links if not link.startswith("#")}
    records = {link for link in others if link.endswith("/record.json")}
    assert len(records) == 25 and all((sweep / "report" / link).is_file() for link in records)
    assert {link.split(":")[0] for link in others - records} <= {"data"}
    assert not [tag for tag, attributes in page.tags if tag in ("link", "iframe") and attributes.get("rel") != "icon"]
    style = (sweep / "report" / "index.html").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_every_link_has_its_place_and_every_name_is_there_once(page: Page) -> None:
    names = page.all("id")
    assert len(names) == len(set(names))
    assert {link[1:] for link in page.all("href") if link.startswith("#")} <= set(names)


def test_a_reader_who_cannot_see_is_told_everything(page: Page) -> None:
    figures = [a for tag, a in page.tags if tag == "svg"]
    assert figures and all(a["role"] == "img" and len(a["aria-label"] or "") > 40 for a in figures)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("caption") == tags.count("table")
    assert all(a.get("scope") == "col" for tag, a in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags
    assert tags.count("h1") == 1


def test_points_that_left_their_sweep_did_not_fail(tmp_path: Path) -> None:
    records = [synthetic.record("svd", 0.2), synthetic.record("svd", 0.4, status=Status.FAILED)]
    records += [synthetic.record("best", 0.2)]
    synthetic.write(records, tmp_path)
    claim = "Best loses less than SVD."
    plan = SweepPlan("s", (), "2026-01-01T00:00:00+00:00", (SweepPoint("000", ()),), claim)
    plan.write(tmp_path)
    page = _page(tmp_path)
    words = " ".join("".join(page.words).split())
    assert "t-failed" not in page.all("id") and "it went wrong" not in words
    assert "1 point no longer in the sweep, not shown" in words and "2 points completed" in words
    assert claim in words


def test_points_as_tidy_data(tmp_path: Path) -> None:
    records = [synthetic.record("svd", 0.2, group_size=0), synthetic.record("basis_sharing", 0.2, group_size=3)]
    page = _page(synthetic.write(records, tmp_path))
    with (tmp_path / "report" / "tables" / "points.csv").open(newline="") as file:
        svd, sharing = csv.DictReader(file)
    assert (float(svd["retain_ratio"]), float(svd["kept"])) == (0.8, 0.8)
    assert (svd["sharing.group_size"], int(sharing["sharing.group_size"])) == ("", 3)
    assert float(sharing["compressed/ppl/wikitext2"]) == records[1].metrics["compressed"]["ppl/wikitext2"]
    assert int(svd["bytes"]) == records[0].size["bytes"]
    (given,) = page.all("data-settings")
    data = json.loads(given)
    i = data["keys"].index("sharing.group_size")
    assert [run["values"][i] for run in data["runs"]] == [None, "3"]
    assert [run["label"] for run in data["runs"]] == ["svd@0.8", "basis_sharing@0.8"]


def test_points_of_figures_say_what_they_are(page: Page) -> None:
    assert len([1 for tag, attributes in page.tags if tag == "circle" and attributes.get("class") == "hit"]) > 20
    words = " ".join("".join(page.words).split())
    assert re.search(r"svd at 90 % \(\u221210 %\): [\d.]+, \+[\d.]+ % against dense, 90.00 % kept", words)
    speed = r"decoding [\d.]+ times the dense speed \([\d.]+ to [\d.]+\), .*?[\d.,]+ tokens/s"
    assert re.search(rf"svd at 90 % \(\u221210 %\): {speed}", words)


def test_what_records_say_is_never_markup(tmp_path: Path) -> None:
    error = {"type": EVIL, "message": EVIL, "stage": EVIL, "traceback": EVIL}
    evil = synthetic.record(EVIL, 0.2, notes=(EVIL,), command=("python", EVIL), versions={EVIL: EVIL})
    write_record(
        replace(evil, hardware={"cpu": EVIL, "gpus": [{"name": EVIL}]}, source={"commit": EVIL}), tmp_path / "a"
    )
    failed = synthetic.record(EVIL, 0.4, status=Status.FAILED)
    write_record(replace(failed, error=error, sweep={"id": EVIL, "job": 0, "settings": [EVIL]}), tmp_path / "b")
    write_record(synthetic.record(hub=f"evil/{EVIL}", changes={"sharing.group_size": EVIL}), tmp_path / "c")
    write_record(synthetic.record(hub=f"evil/{EVIL}", timings={EVIL: 3.0}), tmp_path / "d")
    (tmp_path / "<img src=y>").mkdir()
    (tmp_path / "<img src=y>" / FILE_NAME).write_text("{")
    SweepPlan(EVIL, (EVIL,), "2026", (SweepPoint("later", (EVIL,)),)).write(tmp_path)
    page = _page(tmp_path)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len(page.scripts) == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "".join(page.words).count(EVIL) > 10  # all of it can be read
    markdown = (tmp_path / "report" / "tables.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and "<img" not in markdown


def test_everything_that_went_wrong_is_named(tmp_path: Path) -> None:
    records = [
        synthetic.record("svd", 0.2),
        synthetic.record("svd", 0.2, run_id="again"),
        synthetic.record("svd", 0.4, status=Status.FAILED),
        synthetic.record("svd", 0.5, status=Status.RUNNING),
        synthetic.record("svd", 0.6, status=Status.INTERRUPTED),
    ]
    synthetic.write(records, tmp_path)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / FILE_NAME).write_text('{"name": "s')
    points = [SweepPoint(f"{i:03d}", ()) for i in range(len(records))] + [SweepPoint("later", ("retain_ratio=0.1",))]
    SweepPlan("s", (), "2026-01-01T00:00:00+00:00", tuple(points)).write(tmp_path)
    page = _page(tmp_path)
    assert {"t-failed", "t-unfinished", "t-waiting", "t-skipped", "t-repeated"} <= set(page.all("id"))
    words = " ".join("".join(page.words).split())
    for fact in (
        "it went wrong",
        "half-written",
        "retain_ratio=0.1",
        "2 points failed or stopped",
        "1 point unfinished",
    ):
        assert fact in words
    healthy = tmp_path / "healthy"
    synthetic.write([synthetic.record()], healthy)
    assert "problems" not in _page(healthy).all("id")


def test_every_run_has_its_command_commit_hardware_and_notes(tmp_path: Path) -> None:
    page = _page(synthetic.write([synthetic.record("svd", 0.2, command=("python", "-m", "bs_exp", "a=b c"))], tmp_path))
    words = "".join(page.words)
    for fact in ("python -m bs_exp 'a=b c'", "0123456789abcdef0123456789abcdef01234567", "torch 2.13.0", "A processor"):
        assert fact in words
    assert "56 of 56 decompositions came from the cache" in words
    assert "experiment=svd retain_ratio=0.8" in words


def test_the_same_records_make_the_same_files(sweep: Path, tmp_path: Path) -> None:
    again = write_report([sweep], tmp_path).files
    once = [sweep / "report" / path.relative_to(tmp_path) for path in again]
    # But for links to the records, which lie elsewhere as seen from another folder.
    link = re.compile(rb'href="\./[^"]*/record\.json"')
    assert [link.sub(b"", path.read_bytes()) for path in once] == [link.sub(b"", path.read_bytes()) for path in again]


def test_figures_alone_are_those_of_the_report(sweep: Path, tmp_path: Path) -> None:
    figures = write_figures([sweep], tmp_path).files
    of_report = {path.name: path.read_bytes() for path in (sweep / "report" / "figures").iterdir()}
    assert {path.name: path.read_bytes() for path in figures} == of_report


def test_files_that_are_no_longer_true_go(tmp_path: Path) -> None:
    synthetic.write([synthetic.record(removed=removed) for removed in (0.2, 0.4)], tmp_path / "two")
    synthetic.write([synthetic.record()], tmp_path / "one")
    out = tmp_path / "out"
    first = write_figures([tmp_path / "two"], out).files
    (out / "mine.txt").write_text("stays")
    second = write_figures([tmp_path / "one"], out).files
    assert set(first) - set(second)
    assert not [path for path in set(first) - set(second) if path.exists()]
    assert (out / "mine.txt").exists()


@pytest.mark.parametrize("place", ["report", "report/tables", "report/figures"])
def test_nothing_is_written_through_a_link(cli: Cli, tmp_path: Path, place: str) -> None:
    folder, home = synthetic.write([synthetic.record()], tmp_path / "received"), tmp_path / "home"
    home.mkdir()
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).symlink_to(home, target_is_directory=True)
    ended = cli("report", str(folder))
    assert ended.status == 1
    assert "is a link, through which nothing is written" in ended.err
    assert not list(home.iterdir())


def test_a_real_run_can_be_reported(cli: Cli, tiny: tuple[str, ...], tmp_path: Path) -> None:
    assert cli(*tiny, "hydra.run.dir=runs/one", "cache.dir=null").status == 0
    done = cli("report", "runs")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == [done.out.splitlines()[0], "runs/report/index.html"]
    page = Page((tmp_path / "runs" / "report" / "index.html").read_text(encoding="utf-8"))
    words = "".join(page.words)
    record = read_record(tmp_path / "runs" / "one")
    assert f"{record.metrics['compressed']['ppl/text']:.1f}" in words
    # Time that no table knows would be missing from the cost of compression.
    assert not [stage for stage in record.timings if stage not in set(Stage) and evaluated_model(stage) is None]


def test_commands_say_what_is_wrong(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in ("report", "figures"):
        done = cli(command, "empty")
        assert done.status == 1
        assert done.err.startswith("error: There is no record.json below empty.")
        assert "Traceback" not in done.err
        assert cli(command, "absent").err.startswith("error: absent is no folder.")
        assert cli(command).status == 2
    assert not list((tmp_path / "empty").iterdir())
    synthetic.write([synthetic.record()], tmp_path / "runs")
    (tmp_path / "file").write_text("")
    assert cli("report", "runs", "--out", "file/inside").err.startswith("error: Cannot write the report to file/inside")


def test_what_is_skipped_is_said_on_the_terminal(cli: Cli, tmp_path: Path) -> None:
    synthetic.write([synthetic.record()], tmp_path / "runs")
    (tmp_path / "runs" / "old").mkdir()
    (tmp_path / "runs" / "old" / FILE_NAME).write_text('{"format_version": 0}')
    done = cli("report", "runs", "--out", "page")
    assert done.status == 0
    assert done.err.startswith("skipped runs/old/record.json: ") and "format_version is 0" in done.err
    assert (tmp_path / "page" / "index.html").exists()
    assert cli("figures", "runs").out.splitlines()[-1] == "runs/report/figures"


@pytest.mark.parametrize("command", ["report", "figures"])
def test_help_names_the_folder(cli: Cli, command: str) -> None:
    done = cli(command, "--help")
    assert done.status == 0
    assert re.search(r"FOLDER", done.out) and "--out" in done.out
