"""The page of a run: what it says, what it never says, and that it is made of whatever is there."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest

from adapters.report.report import report_page
from engine.errors import ConfigError
from engine.geo.map_shift import MapShift
from engine.geo.utm import utm_grid
from engine.output.placement_doubts import far_move, with_doubts, wrong_bars
from engine.types import GpsFix, Verdict
from tests.support.headless_chromium import CHROMIUM, chromium
from tests.support.html_pages import Page
from tests.support.reported_runs import ORIGIN, ReportedRun, noisy_model
from tests.support.waiting import HANG_S

MAX_BYTES = 3_000_000
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "nav", "a"),
    *("section", "h1", "h2", "h3", "p", "span", "small", "ul", "li", "dl", "dt", "dd", "div"),
    *("figure", "figcaption", "img", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("svg", "g", "text", "line", "circle", "path", "rect", "image"),
}
ORIGIN_FIX = GpsFix(
    latitude_deg=ORIGIN["latitude_deg"],
    longitude_deg=ORIGIN["longitude_deg"],
    altitude_m=ORIGIN["altitude_m"],
)
HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>\u202e\n'
WRONG = {
    "kind": "overlay",
    "level": "wrong",
    "sentence": "15% of the matches stay at the same place in the image",
    "frame_ids": [],
}


@pytest.fixture(scope="module")
def model() -> pycolmap.Reconstruction:
    return noisy_model()


@pytest.fixture
def run(tmp_path: Path, model: pycolmap.Reconstruction) -> ReportedRun:
    return ReportedRun(tmp_path / "field", model)


def page_of(run: ReportedRun) -> Page:
    data = report_page(run.path)
    assert len(data) < MAX_BYTES
    return Page(data.decode())


def figures_of(run: ReportedRun) -> list[str]:
    """The HTML of each figure."""
    return re.findall(r"<figure>.*?</figure>", report_page(run.path).decode(), flags=re.DOTALL)


# -- what it says -----------------------------------------------------------------------------


def test_the_verdict_comes_first_and_then_the_figures_of_the_summary(run: ReportedRun) -> None:
    text = page_of(run).text
    order = [
        "This map is good",
        "12 of 12",
        "150",
        "Cameras from above",
        "Residuals in",
        "CPU time by",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert f"{run.summary['mean_reprojection_error_px']:.2f} px" in text
    assert "Nothing: every frame that came was used" in text
    assert "All settings are the defaults." in text


def test_a_whole_survey_has_every_section(run: ReportedRun) -> None:
    run.georeference(rejected=["000003.jpg"])
    run.add_products()
    page = page_of(run)
    for words in (
        *("11 positions placed it; 1 position did not agree and was left out.", "North is up."),
        *("70 % is seen well: by three keyframes", "; 3.1 % not at all"),
        *("80 x 60 px, 0.250 m a pixel", "Horizontal distances to positions", "Track lengths"),
        *("280.00 px by EXIF", "+7.1 %", "11 pairs of keyframes", "17 were matched and rejected"),
    ):
        assert words in page.text, words
    assert page.text.count("000003.jpg") >= 2
    assert len([one for one in page.attributes("href") if one.startswith("data:")]) == 4


def test_products_name_their_crs(run: ReportedRun) -> None:
    for package in ("pyproj", "rasterio"):
        pytest.importorskip(package, reason="needs the extra survey")
    run.georeference()
    run.add_products(utm=utm_grid(ORIGIN_FIX))
    text = page_of(run).text
    for name in ("orthophoto", "dsm"):
        assert f"products/{name}.tif: 80 x 60 px, 0.250 m a pixel, EPSG:32615." in text
    assert "tools/setup survey" not in text


def test_products_of_a_placed_map_that_are_pngs_say_how_to_get_geotiffs(run: ReportedRun) -> None:
    run.add_products()
    assert "tools/setup survey" not in page_of(run).text
    run.georeference()
    assert "For GeoTIFFs in the UTM zone: tools/setup survey, then livesfm" in page_of(run).text
    run.summary["dense"] = {"products_in_former_frame": True}
    run.write()
    assert "tools/setup survey" not in page_of(run).text


def test_ground_points_are_listed_with_their_errors_and_check_points_first(
    run: ReportedRun,
) -> None:
    run.georeference()
    del run.summary["georeference"]["offsets_enu_m"]
    run.summary["georeference"] |= {
        "num_positions": 3,
        "gcp_left_out": {"D": "marked in one image only"},
        "scale_bars": [{"ends": ["A0", "B"], "length_m": 9.5, "in_map_m": 9.52, "error_m": 0.02}],
    }
    run.summary["georeference"]["gcp"] = [
        *({"name": f"A{i}", "num_images": 5, "error_m": [0.01, -0.02, 0.02]} for i in range(3)),
        {"name": "A9", "is_used": False, "num_images": 5, "error_m": [7.0, 0.0, 0.0]},
        {"name": "B", "is_check": True, "num_images": 4, "error_m": [0.03, 0.0, -0.04]},
        {"name": "C", "is_check": True, "num_images": 1, "residual_px": None, "error_m": None},
    ]
    run.write()
    text = page_of(run).text
    assert text.index("B check") < text.index("A0 control")
    assert "0.030 0.000 -0.040 0.050" in text
    assert "all control points, rms control – – 0.010 0.020 0.020 0.030" in text
    assert "A9 control, not used" in text
    assert "3 control points placed it." in text
    assert "D marked in one image only" in text
    assert "A0 and B 9.500 9.520 0.020" in text
    assert "older version" not in text
    assert "Check points took no part" in text
    for point in run.summary["georeference"]["gcp"]:
        point["is_check"] = False
    run.write()
    assert "Check points took no part" not in page_of(run).text


def test_a_map_that_control_points_placed_has_no_drawing_of_distances_to_positions(
    run: ReportedRun,
) -> None:
    run.georeference()
    run.summary["georeference"]["gcp"] = [{"name": "A", "error_m": [0.01, 0.0, 0.0]}]
    run.write()
    text = page_of(run).text
    assert "Horizontal distances to positions" not in text
    assert "From positions to cameras" not in text
    del run.summary["georeference"]["offsets_enu_m"]
    run.write()
    assert "Horizontal distances to positions" not in page_of(run).text


def test_a_map_that_control_points_moved_far_from_its_positions_names_the_likely_cause(
    run: ReportedRun,
) -> None:
    run.georeference()
    place = run.summary["georeference"]
    place["gcp"] = [{"name": "A", "error_m": [0.01, 0.0, 0.0]}]
    place["moved_from_positions"] = {"horizontal_m": 3.2, "up_m": 1.5, "is_far": False}
    run.write()
    text = page_of(run).text
    assert "3.20 m horizontally and 1.50 m in height from where positions had them." in text
    place["moved_from_positions"] = {"horizontal_m": 456e3, "up_m": None, "is_far": True}
    run.write()
    assert "456,000 m horizontally from where positions had them: positions are" in (
        page_of(run).text
    )


def test_every_reason_why_a_keyframe_has_no_depth_has_words() -> None:
    from adapters.report.run_sections import _NO_DEPTH
    from engine.dense_types import DepthStatus
    from engine.run import dense

    reasons = {*DepthStatus, *dense.LeftOut, dense._FAILED, dense._LOST, dense._NOT_WRITTEN}
    assert set(_NO_DEPTH) == reasons - {DepthStatus.MADE}


def test_an_address_in_the_words_of_a_run_has_no_credentials_on_the_page(run: ReportedRun) -> None:
    run.summary["not_georeferenced"] = "rtsp://me:secret@10.0.0.1/live gave none"
    run.write()
    page = report_page(run.path).decode()
    assert "rtsp://10.0.0.1/live gave none" in page
    assert "secret" not in page


def test_the_head_says_why_a_map_has_no_place_and_how_to_lay_it(run: ReportedRun) -> None:
    run.summary["not_georeferenced"] = "no photo has a position"
    run.write()
    text = page_of(run).text
    head, _, steps = text.partition("What to do next")
    assert "It is not georeferenced: no photo has a position" in head
    assert "Positions that came later" in steps


def test_a_map_that_only_has_a_scale_is_in_metres_without_north(run: ReportedRun) -> None:
    bars = [{"ends": ["A", "B"], "length_m": 2.0, "in_map_m": 2.0, "error_m": 0.0}]
    run.summary |= {"unit": "metres", "scale_bars": bars}
    run.write()
    text = page_of(run).text
    assert "A and B 2.000 2.000 0.000" in text
    assert "Without positions north is unknown." in text
    assert "map unit" not in text


def test_residuals_are_those_of_the_model(run: ReportedRun, model: pycolmap.Reconstruction) -> None:
    from adapters.report.map_figures import measure_map

    measured = measure_map(model)
    errors = np.concatenate([one.errors_px for one in measured.residuals])
    assert len(errors) == model.compute_num_observations()
    assert errors.mean() == pytest.approx(model.compute_mean_reprojection_error(), rel=1e-6)
    assert 0.3 < errors.mean() < 1.0
    assert "Reprojection error by keyframe" in page_of(run).text


@pytest.mark.parametrize("level", ["doubtful", "wrong"])
def test_a_map_that_is_not_good_says_so_in_every_figure_that_depends_on_it(
    run: ReportedRun, level: str
) -> None:
    run.georeference()
    run.add_products()
    run.judge(level, {**WRONG, "level": level, "frame_ids": list(run.names)[2:4]})
    page = page_of(run)
    assert page.text.index(f"This map is {level}") < page.text.index("keyframes in the map")
    assert "2 keyframes: 000002.jpg, 000003.jpg" in page.text
    assert "What to do next" in page.text
    assert "--mask FILE" in page.text
    warned = [f"of a map judged {level}" in figure for figure in figures_of(run)]
    free = [one for one, is_warned in zip(figures_of(run), warned, strict=True) if not is_warned]
    assert sum(warned) >= 12
    assert len(free) == 2
    assert all("Who matches whom" in one or "CPU time" in one for one in free)
    assert page.text.count("named by the verdict") == 1


def test_doubts_about_the_place_come_with_what_helps(run: ReportedRun) -> None:
    shift = MapShift(horizontal_m=5_600.0, up_m=None, rmse_m=1.0)
    bar = {"ends": ["A", "B"], "length_m": 2.0, "in_map_m": 3.0, "error_m": 1.0, "std_m": 0.01}
    doubts = (
        *far_move(shift, by="control points", from_where="positions", likely="the zone is wrong"),
        *wrong_bars([bar]),
    )
    verdict = with_doubts(Verdict(), doubts, is_moved=True)
    run.judge(
        verdict.level.value,
        *(
            {"kind": one.kind, "level": one.level.value, "sentence": one.sentence}
            for one in verdict.reasons
        ),
    )
    _, _, steps = page_of(run).text.partition("What to do next")
    assert "livesfm georeference field --gcp FILE (or --positions FILE)" in steps
    assert "Check the marks and the length of the scale bar" in steps


def test_a_good_map_has_no_warning_and_its_remarks_are_no_doubts(run: ReportedRun) -> None:
    run.judge("good", {**WRONG, "level": "good"})
    page = page_of(run)
    assert "This map is good, with a remark" in page.text
    assert "judged" not in page.text


def test_without_a_map_the_page_says_what_came_in(run: ReportedRun) -> None:
    (run.path / "latest").unlink()
    run.summary |= {"registered_keyframes": 0, "num_points3D": 0, "frames_dropped": {"failed": 2}}
    run.judge("wrong", {"kind": "no_map", "level": "wrong", "sentence": "no map: too dark"})
    text = page_of(run).text
    assert "No map: too dark." in text
    assert "0 of 12" in text
    assert "nothing could be described in them 2" in text
    assert "judged" not in text


def test_what_was_left_out_is_listed_by_kind_and_reason(run: ReportedRun) -> None:
    run.summary["left_out"] = [
        {
            "source": "photos",
            "kind": ".pdf",
            "reason": "no image",
            "num_files": 3,
            "example": "/home/somebody/photos/plan.pdf",
        }
    ]
    run.frames.append(["", "photos", 12, "late.jpg", "12.5", "dropped:unreadable", "", ""])
    run.summary |= {"frames_dropped": {"unreadable": 1}, "faults": {"views: raised": 2}}
    run.summary["overlays"] = {"camera": {"share": 0.0213}}
    run.summary["lost"] = [{"frame_ids": list(run.names)[1:4], "num_missing": 2, "num_apart": 1}]
    run.summary["dense"] = {"keyframes_without": {"budget": 4}}
    run.write()
    text = page_of(run).text
    for words in (
        *("cannot be decoded 1 late.jpg", ".pdf 3 no image plan.pdf", "views: raised 2"),
        *("camera 2.1", "000001.jpg to 000003.jpg 3 2 in no map now, 1 in another map"),
        "the share of CPU time for depth was spent 4",
    ):
        assert words in text, words
    assert "somebody" not in text


def test_latencies_are_those_of_live_sources_only(run: ReportedRun) -> None:
    assert "Latency" not in page_of(run).text
    run.events[1]["is_live"] = True
    run.write()
    text = page_of(run).text
    assert "keyframes, to their place in the map 347 ms 632 ms 828 ms" in text
    assert "Latency over the run" in text


def test_settings_that_differ_are_shown_beside_their_defaults(run: ReportedRun) -> None:
    file = run.path / "config.yaml"
    changed = re.sub(r"max_features: \d+", "max_features: 1234", file.read_text(), count=1)
    file.write_text(changed + "former_section:\n  gone: 1\n")
    text = page_of(run).text
    assert re.search(r"sift\.max_features 1,?234 \d", text)
    assert "former_section" in text
    assert text.count("max_features") == 1


# -- what it never says -----------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere_and_allows_no_script(run: ReportedRun) -> None:
    run.georeference()
    run.add_products()
    run.add_images()
    page = page_of(run)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert all(one.startswith("data:image/") for one in page.attributes("src"))
    assert all(one.startswith(("data:image/", "#")) for one in page.attributes("href"))
    assert not page.attributes("style")
    assert not re.search(r"url\(|@import", page.style)
    (policy,) = (
        attributes["content"]
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"style-src 'sha256-{digest}'" in policy
    assert "script-src" not in policy


def test_every_picture_has_a_text_and_every_table_heads(run: ReportedRun) -> None:
    run.georeference()
    run.add_products()
    run.add_images()
    page = page_of(run)
    drawings = [one for tag, one in page.tags if tag == "svg" and "aria-hidden" not in one]
    assert len(drawings) > 10
    assert all(one["role"] == "img" and one["aria-label"] for one in drawings)
    assert all(one["alt"] for tag, one in page.tags if tag == "img")
    heads = [one.get("scope") for tag, one in page.tags if tag == "th"]
    assert heads.count("col") >= 10
    assert set(heads) == {"col", "row"}
    assert page.count("caption") == page.count("table") > 5


def test_hostile_names_are_only_text(tmp_path: Path, model: pycolmap.Reconstruction) -> None:
    run = ReportedRun(
        tmp_path / "<b>run & 'field'", model, name='"><img src=x onerror=alert({})>'.format
    )
    run.georeference(rejected=list(run.names.values())[:2])
    run.summary["georeference"]["gcp"] = [{"name": HOSTILE, "error_m": [1.0, 2.0, 3.0]}]
    run.summary["cameras"][0] |= {"key": HOSTILE, "doubts": [HOSTILE], "origin": HOSTILE}
    run.summary["faults"] = {HOSTILE: 1}
    run.summary["frames_dropped"] = {HOSTILE: 1}
    run.summary["cpu_by_stage_s"] = {HOSTILE: 3.0}
    run.summary["not_saved"] = [HOSTILE]
    run.summary["left_out"] = [{"source": HOSTILE, "kind": HOSTILE, "reason": HOSTILE}]
    run.events[0] |= {"sources": [HOSTILE, "雪" * 5000], "matcher": HOSTILE}
    (run.path / "config.yaml").write_text(f"{json.dumps(HOSTILE)}: {json.dumps(HOSTILE)}\n")
    run.judge("wrong", {**WRONG, "sentence": HOSTILE, "frame_ids": list(run.names)})
    page = page_of(run)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert not [name for _, one in page.tags for name in one if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "\u202e" not in page.text
    assert "雪" * 200 not in page.text


def test_credentials_and_folders_of_the_user_are_not_in_it(run: ReportedRun) -> None:
    run.events[0]["sources"] = ["rtsp://me:sesame@192.168.1.20/live?token=abc", "/home/me/walk.mp4"]
    run.write()
    file = run.path / "config.yaml"
    secret = "positions: [/home/me/secret/geo.txt]"
    file.write_text(
        file.read_text()
        .replace("positions: []", secret)
        .replace("publish: ''", "publish: mqtts://me:sesame@broker/site")
    )
    html = report_page(run.path).decode()
    assert "rtsp://192.168.1.20/live" in html
    assert "…/walk.mp4" in html
    assert "…/geo.txt" in html
    assert "mqtts://broker/site" in html
    for secret in ("sesame", "abc", "/home/me", "secret", str(run.path.parent)):
        assert secret not in Page(html).text, secret


# -- what is missing --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("events.jsonl", "events.jsonl is not there."),
        ("config.yaml", "config.yaml is not there."),
        ("latest", "No map to draw: latest/sparse/0 is not there."),
    ],
)
def test_what_is_missing_is_named_where_it_would_be_shown(
    run: ReportedRun, name: str, words: str
) -> None:
    (run.path / name).unlink()
    text = page_of(run).text
    assert words in text
    assert "This map is good" in text


def test_a_killed_run_is_told_from_one_that_ended(run: ReportedRun) -> None:
    (run.path / "summary.json").unlink()
    with (run.path / "frames.csv").open("a") as file:
        file.write(",photos,12,late.jpg,12.5,dropped:overload,,\n")
    verdict = {"level": "doubtful", "reasons": [{**WRONG, "level": "doubtful"}]}
    run.events[-1] = {"event": "VerdictChanged", "at_s": 3.0, "verdict": verdict}
    lines = "\n".join(json.dumps(event) for event in run.events)
    (run.path / "events.jsonl").write_text(f'{lines}\n{{"event": "FrameRec')
    text = page_of(run).text
    assert "Unfinished run: the map is doubtful so far" in text
    assert "livesfm resume field" in text
    assert "13 1 of them dropped" in text
    assert "12 of 12" in text
    assert "summary.json is not there." in text
    assert "of a map judged doubtful" in text


def test_a_killed_run_lies_where_its_snapshot_says(run: ReportedRun) -> None:
    (run.path / "summary.json").unlink()
    snapshot = {
        "georeference": {"origin": ORIGIN, "num_positions": 11, "rmse_m": 0.51, "rejected": []},
        "models": [{"is_georeferenced": True, "num_registered": 12, "num_points3D": 150}],
    }
    (run.path / "latest" / "snapshot.json").write_text(json.dumps(snapshot))
    text = page_of(run).text
    assert "11 positions placed it" in text
    assert "North is up." in text
    assert "map unit" not in text
    assert "0.510 m" in text


def test_a_resumed_run_that_was_killed_is_unfinished(run: ReportedRun) -> None:
    run.events.append({"event": "RunResumed", "at_s": 9.0, "sources": [], "matcher": "sift"})
    run.write()
    assert "Unfinished run" in page_of(run).text


def test_a_folder_that_holds_no_more_than_its_tables_has_a_page(run: ReportedRun) -> None:
    for entry in list(run.path.iterdir()):
        if entry.name != "frames.csv":
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    text = page_of(run).text
    assert "Unfinished run: no map" in text
    assert "12 frames" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        report_page(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"verdict": 3}', b"\xff\xfe", b"[" * 2_000])
@pytest.mark.parametrize("name", ["summary.json", "events.jsonl", "config.yaml"])
def test_damaged_files_do_not_cost_the_page(run: ReportedRun, name: str, content: bytes) -> None:
    (run.path / name).write_bytes(content)
    text = page_of(run).text
    assert "What was left out" in text
    assert "Cameras from above" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("orthophoto.png", "The orthophoto cannot be shown"),
        ("dsm.png", "The surface model cannot be shown"),
        ("coverage.geojson", "Coverage cannot be shown"),
        ("dense.ply", "The dense map cannot be shown"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"ply\nno", b'{"features": [{"properties": 1}]}'])
def test_damaged_products_are_named(
    run: ReportedRun, name: str, words: str, content: bytes
) -> None:
    run.georeference()
    run.add_products()
    (run.path / "products" / name).write_bytes(content)
    text = page_of(run).text
    assert words in text
    assert "Horizontal distances to positions" in text


def test_a_cut_model_is_named(run: ReportedRun) -> None:
    file = run.path / "latest" / "sparse" / "0" / "images.bin"
    file.write_bytes(file.read_bytes()[:-9])
    text = page_of(run).text
    assert "latest/sparse/0 cannot be used" in text
    assert str(run.path) not in text


def test_an_older_run_has_distances_without_directions(run: ReportedRun) -> None:
    run.georeference()
    del run.summary["georeference"]["offsets_enu_m"]
    run.write()
    text = page_of(run).text
    assert "it kept distances to positions, not directions" in text
    assert "Distances to positions" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda summary: summary.update(cpu_by_stage_s={"a": 1e300}, wall_s=-1.0, cpu_s=1e300),
        lambda summary: summary["cameras"][0].update(
            moved_ratio=1e200, prior_sigma_ratio=1e200, focal_px=-1e300
        ),
        lambda summary: summary["georeference"].update(rmse_m=1e300, rejected=["x"] * 5000),
        lambda summary: summary["georeference"]["offsets_enu_m"].update(
            {"000000.jpg": [1e300, -1e300, None], "000001.jpg": [None, None, None]}
        ),
    ],
)
def test_absurd_numbers_do_not_cost_the_page(
    run: ReportedRun, change: Callable[[dict[str, Any]], None]
) -> None:
    run.georeference()
    change(run.summary)
    run.write()
    assert "What was left out" in page_of(run).text


# -- how large it is --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_page_of_many_keyframes_stays_small_and_readable(tmp_path: Path) -> None:
    run = ReportedRun(
        tmp_path / "long", noisy_model(1200, 60), name=f"{'雪' * 70}{{:04d}}.jpg".format
    )
    run.georeference(rejected=list(run.names.values())[::3])
    ids = list(run.names)
    rng = np.random.default_rng(0)
    run.events[-1:] = [
        {"event": "PairVerified", "first": i, "second": int(j), "num_inliers": int(j) % 400 + 18}
        for i in ids
        for j in rng.choice(ids, 16)
        if i != j
    ] + run.events[-1:]
    run.judge("wrong", *({**WRONG, "frame_ids": ids} for _ in range(12)))
    data = report_page(run.path)
    assert len(data) < MAX_BYTES
    text = Page(data.decode()).text
    assert "Measured in 250 of 1,200 keyframes" in text
    assert "A cell stands for 5 keyframes" in text
    assert "380 more are in summary.json." in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_phone_shows_it_whole_and_the_browser_complains_of_nothing(
    run: ReportedRun, tmp_path: Path
) -> None:
    run.georeference(rejected=["000003.jpg"])
    run.add_products()
    run.judge("wrong", {**WRONG, "sentence": "x" * 400})
    page = tmp_path / "report.html"
    page.write_bytes(report_page(run.path))

    async def look() -> None:
        async with asyncio.timeout(HANG_S), chromium(tmp_path / "profile") as tab:
            await tab.hold(360, 740)
            await tab.open(page.as_uri())
            beyond = await tab.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert beyond <= 0
            wide = await tab.evaluate(
                "[...document.querySelectorAll('figure, table, p, li')]"
                ".filter(e => e.getBoundingClientRect().right > innerWidth).length"
            )
            assert wide == 0
            assert await tab.evaluate("getComputedStyle(document.body).maxWidth") == "1060px"
            assert not tab.complaints

    asyncio.run(look())
