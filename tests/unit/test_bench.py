"""What the benchmarks print: statistics, the table, and the documents' copies of it. No benchmark runs here."""

import json

import pytest

from bench import capacity, million, readme
from bench.figures import (
    Figure,
    Report,
    Row,
    Target,
    aligned,
    markdown,
    number,
    percentile,
    ratio,
    ratio_text,
)

RESULTS = json.loads(readme.RESULTS.read_text("utf-8")) if readme.RESULTS.exists() else None


def figure(*values):
    return Figure.of(values)


def row(**changes):
    plain = {"id": "P0", "what": "something", "unit": "us", "ours": figure(3, 1, 2)}
    return Row(**{**plain, **changes})


def a_result(*rows):
    return {
        "rows": [one.to_json() for one in rows],
        "commit": "0123456789abcdef",
        "dirty": False,
        "date": "2026-11-24T08:00:00+00:00",
        "quick": False,
        "only": [],
        "cpu": "A CPU",
        "cores": 2,
        "python": "3.11.7",
        "server": "valkey 9.1.2",
        "allocator": "libc",
        "transport": "unix socket",
    }


@pytest.mark.parametrize(
    "values, share, expected",
    [
        ([5], 0.5, 5),
        ([5], 0.99, 5),
        ([1, 2, 3, 4], 0.5, 2),
        ([4, 3, 2, 1], 0.75, 3),
        (range(1, 101), 0.99, 99),
        (range(1, 1001), 0.99, 990),
        ([1, 2], 0.0, 1),
        ([1, 2], 1.0, 2),
    ],
)
def test_a_percentile_is_the_smallest_value_that_covers_its_share(values, share, expected):
    assert percentile(list(values), share) == expected


def test_nothing_has_no_percentile_and_no_figure():
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)
    with pytest.raises(ValueError, match="needs a value"):
        Figure.of([])


def test_a_figure_keeps_every_value():
    assert figure(3, 1, 2).to_json() == {"min": 1, "median": 2, "max": 3, "values": [3, 1, 2]}


def test_a_ratio_pairs_the_contenders_round_by_round():
    # The machine was three times slower in the second round, for both.
    assert ratio(figure(1, 3, 1), figure(2, 6, 2)) == 0.5
    assert ratio(figure(1, 30, 1), figure(2, 6, 2)) == 0.5


def test_a_ratio_of_unequal_rounds_is_that_of_the_medians():
    assert ratio(figure(1, 2, 3), figure(4)) == 0.5


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.0004567, "0.000457"),
        (0.4567, "0.457"),
        (0.4, "0.4"),
        (3.0, "3"),
        (9.996, "10"),
        (12.34, "12.3"),
        (99.96, "100"),
        (1234.5, "1,230"),
        (123_456.7, "123,000"),
        (-12.34, "-12.3"),
        (float("inf"), "inf"),
    ],
)
def test_a_number_has_three_significant_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    "value, text", [(1.0026, "1.003"), (0.9976, "0.9976"), (1.0, "1"), (1.0525, "1.05"), (2, "2")]
)
def test_a_ratio_near_1_has_a_digit_more(value, text):
    assert ratio_text(value) == text


@pytest.mark.parametrize(
    "target, met, text",
    [
        (Target(2), True, "≤ 2 us"),
        (Target(1.9), False, "≤ 1.9 us"),
        (Target(2, at_least=True), True, "≥ 2 us"),
        (Target(2.1, at_least=True), False, "≥ 2.1 us"),
        (Target(0.5, of_ratio=True), True, "≤ 0.5 x"),
        (Target(0.4, of_ratio=True), False, "≤ 0.4 x"),
        (Target(0.5, at_least=True, of_ratio=True), True, "≥ 0.5 x"),
    ],
)
def test_a_target_judges_our_figure_or_the_ratio(target, met, text):
    judged = row(rival=figure(6, 2, 4), rival_name="them", target=target).to_json()
    assert (judged["met"], judged["target"], judged["ratio"]) == (met, text, 0.5)


def test_a_row_without_a_target_is_not_judged():
    assert row().to_json()["met"] is None


def test_a_target_for_a_ratio_needs_a_rival():
    with pytest.raises(AssertionError, match="no rival"):
        row(target=Target(1, of_ratio=True)).to_json()


def test_the_table():
    rows = [
        row(rival=figure(6, 2, 4), rival_name="them", target=Target(0.4, of_ratio=True)).to_json(),
        row(id="P1", ours=figure(1500), unit="/s").to_json(),
    ]
    assert markdown(rows).splitlines() == [
        "| row | what | ours | rival | ratio | target | met |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| P0 | something | 2 us | 4: them | 0.5 x | ≤ 0.4 x | **no** |",
        "| P1 | something | 1,500 /s |  |  |  |  |",
    ]
    assert aligned(rows).splitlines()[1].split() == [
        "P0", "something", "2", "us", "4:", "them", "0.5", "x", "≤", "0.4", "x", "**no**",
    ]  # fmt: skip


def test_a_report_finds_its_figures():
    report = Report(figures={"ours": {"us": figure(1)}})
    assert report.figure("ours", "us").median == 1


def test_reports_are_joined_under_the_name_of_their_group():
    whole = Report()
    for core, group in (("worker", "P15"), ("Valkey", "P16"), ("worker", "P16")):
        part = Report(rows=[row()], figures={"ours": {"us": figure(1)}})
        part.add_cost(core, f"of {group}", figure(3, 1, 2))
        whole.include(part, group)
    assert len(whole.rows) == 3
    assert whole.figures.keys() == {"P15: ours", "P16: ours"}
    assert whole.costs == {"worker": {"of P15": 2, "of P16": 2}, "Valkey": {"of P16": 2}}


COSTS = {
    "Valkey": {"ff_fast, durable": 5.0, "redis-py asyncio": 50.0},
    "worker": {"ff_fast, durable": 4.0},
}


def test_a_core_carries_as_many_streams_as_their_frames_fill_it():
    assert capacity.streams(5.0, 200) == 1_000
    assert capacity.table(COSTS).splitlines()[2:] == [
        "| Valkey | stores a frame and delivers it to its reader | ff_fast, durable | 5 | 6,700 | 3,300 | 1,000 |",
        "| Valkey | stores a frame and delivers it to its reader | redis-py asyncio | 50 | 670 | 330 | 100 |",
        "| worker | writes a frame, beyond its own schedule | ff_fast, durable | 4 | 8,300 | 4,200 | 1,200 |",
    ]


def test_the_picture_has_a_bar_for_each_core_of_a_contender():
    bars = capacity.bars(COSTS)
    assert [core for core, _ in bars["ff_fast, durable"]] == ["Valkey", "worker"]
    assert [round(streams) for _, streams in bars["redis-py asyncio"]] == [333]


def test_the_model_of_cost_is_told_of_its_run():
    assert readme.carried(a_result()) == readme.NOT_MEASURED
    said = readme.carried({**a_result(), "costs": COSTS})
    for part in (capacity.table(COSTS), "A CPU", "0123456789"):
        assert part in said


FLEETS = {
    name: {
        "server_us": 6.0,
        "stream_bytes": 2000.0,
        "frame_bytes": 50.0,
        "connections": 3.0,
        "in_bytes": 50.0,
        "out_bytes": 80.0,
    }
    for name in million.CHECKED
}


def test_the_model_of_a_large_deployment():
    checked, needed = (part.splitlines() for part in million.table(FLEETS).split("\n\n"))
    assert checked[2] == "| server us a frame | 6 | 6 | 6 |"
    # 60 million frames a second of 6 us fill 360 cores, and 60 % of 600.
    assert needed[2] == "| primaries | 600 | 1 |"
    assert needed[4] == "| memory, GiB | 170 | 0.28 |"
    assert needed[6] == "| network in, Mbit/s | 24,000 | 40 |"


def test_a_large_deployment_is_told_of_its_run():
    assert readme.fleets({**a_result(), "costs": COSTS}) == readme.NOT_MEASURED
    assert million.table(FLEETS) in readme.fleets({**a_result(), "costs": FLEETS})


def test_the_pictures_of_a_run_are_shown():
    assert readme.pictures(a_result()) == ""
    shown = readme.pictures({**a_result(), "costs": COSTS})
    for name in ("latency", "capacity"):
        assert f"](results/{name}.png)" in shown
    assert readme.picture(a_result()) == ""
    assert readme.picture({**a_result(), "costs": COSTS}).endswith("](bench/results/latency.png)")


@pytest.mark.parametrize("name", readme.PARTS)
def test_a_text_gets_its_part_and_keeps_the_rest(name):
    before = f"# Title\n<!-- {name}:begin -->\nold\n<!-- {name}:end -->\nrest\n"
    after = readme.replaced(before, name, "new")
    assert after == f"# Title\n<!-- {name}:begin -->\nnew\n<!-- {name}:end -->\nrest\n"
    assert readme.replaced(after, name, "new") == after


def test_the_table_is_told_of_its_run():
    text = readme.numbers(a_result(row()))
    for said in ("| P0 |", "valkey 9.1.2", "allocator libc", "A CPU", "0123456789", "2026-11-24"):
        assert said in text


def test_the_readme_tells_ten_rows():
    known = [row(id=id_, what=what) for id_, what, _ in readme.TOLD]
    text = readme.told(a_result(*known, row(id="P9", what="another", target=None)))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [
        words for _, _, words in readme.TOLD[:10]
    ]
    assert "Of 0 targets 0 are met" in text


BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_text_without_its_markers_is_refused(text):
    with pytest.raises(ValueError, match="must have"):
        readme.replaced(text, "numbers", "table")


@pytest.mark.parametrize("change", [{"quick": True}, {"only": ["P1a"]}])
def test_only_a_complete_run_is_copied(tmp_path, monkeypatch, capsys, change):
    path = tmp_path / "latest.json"
    path.write_text(json.dumps({**a_result(row()), **change}))
    monkeypatch.setattr(readme, "RESULTS", path)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.main() == 1
    assert "make bench" in capsys.readouterr().err


@pytest.mark.parametrize("name", readme.PARTS)
def test_a_file_shows_the_results_that_are_in_the_repository(name):
    file, part = readme.PARTS[name]
    text = (readme.ROOT / file).read_text("utf-8")
    expected = readme.NOT_MEASURED if RESULTS is None else part(RESULTS)
    assert readme.replaced(text, name, expected) == text, "run `python -m bench.readme`"
