"""Many worlds on many workers: what a table of jobs says, who does them, what is left after failures, kills and a second run."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
from PIL import Image

PRESETS = ("orbit_horizontal", "rotate_spot")


@pytest.fixture(scope="module")
def fleet(launcher):
    """tools/fleet.py as a module."""
    return conftest.load_tool("fleet")


@pytest.fixture(scope="module")
def bench():
    """tools/benches/fleet.py as a module."""
    conftest.load_package("lyra_benches", conftest.PROJECT / "tools" / "benches")
    return importlib.import_module("lyra_benches.fleet")


@pytest.fixture
def written(tmp_path):
    def write(text: str, name: str = "jobs.jsonl") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


# ------------------------------------------------------------------------------------------------------------- the jobs


def test_a_row_says_a_job_and_the_rest_is_as_the_command_says(fleet, written, tmp_path):
    rows = [
        {"photo": "a.png", "path": "walks/w.npz", "seed": 7, "settings": {"ImageScale.width": 96}},
        {"workflow": "zoom", "photo": "s3://bucket/b.jpg", "path": "orbit_horizontal", "prompt": "a hall"},
    ]
    jobs = fleet.read_jobs(written("\n".join(map(json.dumps, rows)) + "\n\n"), fleet.Job(settings=("A.b=1",)))
    assert jobs[0] == fleet.Job(
        photo=str(tmp_path / "a.png"), path=str(tmp_path / "walks" / "w.npz"), seed=7, settings=("A.b=1", "ImageScale.width=96")
    )
    assert (jobs[1].workflow, jobs[1].photo, jobs[1].path, jobs[1].prompt) == ("zoom", "s3://bucket/b.jpg", "orbit_horizontal", "a hall")


def test_a_table_with_columns_says_the_same_as_one_with_rows(fleet, written):
    table = 'photo,path,seed,prompt,ImageScale.width\na.png,w.npz,7,"a hall, dark",96\nb.png,,,,\n'
    rows = [
        {"photo": "a.png", "path": "w.npz", "seed": 7, "prompt": "a hall, dark", "settings": ["ImageScale.width=96"]},
        {"photo": "b.png"},
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    assert fleet.read_jobs(written(table, "jobs.csv"), fleet.Job()) == fleet.read_jobs(written(text), fleet.Job())


def test_a_folder_of_photos_is_walked_along_every_path(fleet, tmp_path):
    for name in ("p10.png", "p2.jpg", "note.txt"):
        (tmp_path / name).touch()
    jobs = fleet.read_jobs(tmp_path, fleet.Job(), ["orbit_horizontal", "spiral"])
    assert [(Path(job.photo).name, job.path) for job in jobs] == [
        ("p2.jpg", "orbit_horizontal"), ("p2.jpg", "spiral"), ("p10.png", "orbit_horizontal"), ("p10.png", "spiral"),
    ]  # fmt: skip


def test_a_key_says_what_the_job_says_and_nothing_else(fleet, written):
    job = fleet.Job(photo="/a/room.png", path="orbit_horizontal", seed=1)
    others = [
        fleet.Job(photo="/b/room.png", path="orbit_horizontal", seed=1),
        fleet.Job(photo="/a/room.png", path="spiral", seed=1),
        fleet.Job(photo="/a/room.png", path="orbit_horizontal", seed=2),
        fleet.Job(photo="/a/room.png", path="orbit_horizontal", seed=1, settings=("A.b=1",)),
    ]
    assert len({job.key, *(other.key for other in others)}) == 5
    assert job.key == fleet.Job(photo="/a/room.png", path="orbit_horizontal", seed=1).key
    assert job.key.startswith("room-orbit_horizontal-")
    assert len(fleet.read_jobs(written('{"photo": "a.png"}\n{"photo": "./a.png"}\n'), fleet.Job())) == 1


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ('{"foto": "a.png"}', "jobs.jsonl", "line 1: says 'foto'; a job says workflow, photo"),
        ('{"photo": "a.png"}\n[1]', "jobs.jsonl", "line 2: is '\\[1\\]'; a job is an object"),
        ('{"photo": "a.png"\n', "jobs.jsonl", "line 1"),
        ('{"photo": 7}', "jobs.jsonl", "photo is 7, which is no text"),
        ('{"seed": "x"}', "jobs.jsonl", "seed is 'x', which is no whole number"),
        ('{"seed": true}', "jobs.jsonl", "seed is True"),
        ('{"settings": {"width": 3}}', "jobs.jsonl", "expected .*NODE.INPUT"),
        ('{"settings": 3}', "jobs.jsonl", "settings are 3"),
        ("photo\na.png,b.png\n", "jobs.csv", "line 2: has more cells"),
        ("picture\na.png\n", "jobs.csv", "line 2: says 'picture'"),
        ("", "jobs.csv", "holds no jobs"),
        ("a.png", "jobs.txt", "expected a .jsonl, a .csv or a folder"),
    ],
)
def test_what_is_no_job_is_refused_with_its_line(fleet, written, text, name, words):
    with pytest.raises((fleet.WorkflowError, ValueError), match=words):
        fleet.read_jobs(written(text, name), fleet.Job())


def test_a_job_sets_all_that_takes_what_it_says(fleet, tmp_path):
    spec = {"prompt": ["STRING", {}], "seed": ["INT", {}]}
    info = {"Paint": {"input": {"required": spec}}, "Load": {"input": {"required": {"seed_of": ["INT", {}]}}}}
    prompt = {"1": {"class_type": "Paint", "inputs": {"prompt": ["2", 0], "seed": 1}}, "2": {"class_type": "Load", "inputs": {}}}
    order = fleet.Job(photo="/a.png", path="spiral", prompt="a hall", seed=4, settings=("1.x=2",)).order
    settings = fleet.fleet_worker.settings_of(order, prompt, info, tmp_path)
    assert settings == ["LoadImage.image=@/a.png", "Lyra2PresetTrajectory.preset=spiral", "1.prompt=a hall", "1.seed=4", "1.x=2"]
    with pytest.raises(fleet.WorkflowError, match="has a prompt, but no node"):
        fleet.fleet_worker.settings_of(order, {"2": prompt["2"]}, info, tmp_path)


def test_all_that_a_workflow_writes_goes_to_the_folder_of_its_job(fleet):
    info = {"Walk": {"input": {"required": {"save_to": ["STRING", {}]}}}}
    prompt = {
        "1": {"class_type": "Walk", "inputs": {"save_to": "worlds/zoom_%photo%"}},
        "2": {"class_type": "Walk", "inputs": {"save_to": ""}},
        "3": {"class_type": "SaveVideo", "inputs": {"filename_prefix": "lyra2/zoom"}},
        "4": {"class_type": "Lyra2ExportWorld", "inputs": {"folder": "exports/zoom"}},
        "5": {"class_type": "Lyra2LoadWorld", "inputs": {"folder": "worlds/old"}},
        "6": {"class_type": "Walk", "inputs": {"save_to": ["5", 0]}},
    }
    fleet.fleet_worker.redirect(prompt, "worlds/KEY", info)
    said = [next(iter(node["inputs"].values())) for node in prompt.values()]
    assert said == ["worlds/KEY/zoom", "worlds/KEY/world_2", "worlds/KEY/zoom", "worlds/KEY/zoom", "worlds/old", ["5", 0]]


# --------------------------------------------------------------------------------------------------------- who does them


class Pool:
    """Workers that do as a script says: `says(slot, order, attempt)` is an outcome."""

    def __init__(self, slots: int, says):
        self.slots, self.says, self.tried, self.log = range(slots), says, Counter(), []

    def submit(self, slot, order):
        self.log.append((slot, order and order["key"]))
        return len(self.log)

    def wait(self, running):
        ticket, (slot, order) = next(iter(running.items()))
        name = order["key"] if order else f"start {slot}"
        self.tried[name] += 1
        return ticket, self.says(slot, order and order["key"], self.tried[name])

    def forget(self, slot):
        self.log.append((slot, "forgotten"))


def driven(fleet, pool, *keys: str) -> tuple[dict, list]:
    rows, logs = {}, {}

    def on_end(order, row, log):
        rows[order["key"]], logs[order["key"]] = row, log

    return rows, fleet.drive([{"key": key} for key in keys], pool, on_end), logs


def test_a_job_that_fails_is_taken_up_after_the_others_and_three_failures_set_it_aside_with_all_their_logs(fleet):
    def says(slot, key, attempt):
        return {"error": f"fault {attempt}", "log": "lines"} if key == "bad" or (key == "late" and attempt < 3) else {"status": "done"}

    pool = Pool(1, says)
    rows, left, logs = driven(fleet, pool, "bad", "late", "good")
    assert [key for _, key in pool.log] == [None, "bad", "late", "good", "bad", "late", "bad", "late"]
    assert (rows["bad"]["status"], rows["bad"]["attempts"], rows["bad"]["error"]) == ("failed", 3, "fault 3")
    assert (rows["late"]["status"], rows["late"]["attempts"]) == ("done", 3) and rows["good"]["attempts"] == 1
    assert [line for text in logs["bad"] for line in text.splitlines()] == [
        "attempt 1: fault 1", "lines", "attempt 2: fault 2", "lines", "attempt 3: fault 3", "lines",
    ]  # fmt: skip
    assert left == []


def test_a_lost_worker_is_started_again_and_its_job_is_done(fleet):
    pool = Pool(2, lambda slot, key, attempt: {"error": "killed", "lost": True} if (key, attempt) == ("b", 1) else {"status": "done"})
    rows, left, _ = driven(fleet, pool, "a", "b", "c")
    assert {key: row["attempts"] for key, row in rows.items()} == {"a": 1, "b": 2, "c": 1} and not left
    lost = pool.log.index(next(entry for entry in pool.log if entry[1] == "forgotten"))
    assert pool.log[lost + 1] == (pool.log[lost][0], None)


def test_a_worker_that_does_not_start_costs_no_job_an_attempt(fleet):
    pool = Pool(2, lambda slot, key, attempt: {"error": "no memory"} if slot == 1 and key is None else {"status": "done"})
    rows, left, _ = driven(fleet, pool, "a", "b")
    assert pool.tried["start 1"] == 3
    assert {key: row["attempts"] for key, row in rows.items()} == {"a": 1, "b": 1} and not left


def test_jobs_are_handed_back_if_no_worker_starts(fleet):
    rows, left, _ = driven(fleet, Pool(2, lambda *_: {"error": "no memory"}), "a", "b")
    assert rows == {} and [order["key"] for order in left] == ["a", "b"]


def test_each_worker_has_a_gpu_where_there_are_some_and_cores_elsewhere(fleet):
    assert fleet.shares([(16, 2), (16, 2), (4, 0)], 0) == (4, {"num_gpus": 1, "num_cpus": 8})
    assert fleet.shares([(16, 2)], 1) == (1, {"num_gpus": 1, "num_cpus": 8})
    assert fleet.shares([(8, 0), (3, 0)], 0) == (5, {"num_gpus": 0, "num_cpus": 2})
    assert fleet.shares([(2, 0)], 2) == (2, {"num_gpus": 0, "num_cpus": 1})
    assert fleet.shares([(1, 0)], 0) == (1, {"num_gpus": 0, "num_cpus": 1})
    for nodes, asked in (([(16, 2)], 3), ([(2, 0)], 3)):
        with pytest.raises(fleet.WorkflowError, match=f"--workers {asked}, but there are 2"):
            fleet.shares(nodes, asked)


def test_without_ray_the_jobs_run_in_turn_and_how_to_get_it_is_said(fleet, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fleet.importlib.util, "find_spec", lambda name: None)
    options = fleet.parser().parse_args(["jobs.jsonl"])
    assert isinstance(fleet.pool_for(options, str(tmp_path)), fleet.InTurn)
    assert "one after another" in (said := capsys.readouterr().out) and "pip install 'ray[client]'" in said
    with pytest.raises(fleet.WorkflowError, match="--address needs Ray"):
        fleet.pool_for(fleet.parser().parse_args(["jobs.jsonl", "--address", "ray://there:10001"]), str(tmp_path))


def test_ctrl_c_stops_the_workers_and_writes_down_what_is_done(fleet, monkeypatch, capsys, tmp_path):
    closed, jobs = [], [fleet.Job(seed=n) for n in range(3)]
    results = fleet.Results(str(tmp_path), jobs)

    def says(slot, key, attempt):
        if key == jobs[1].key:
            raise KeyboardInterrupt
        return key and {"status": "done", "key": key, "seconds": 1.0, "worker": "here/0", "files": {}} or {"status": "up"}

    pool = Pool(1, says)
    pool.close = lambda: closed.append(signal.getsignal(signal.SIGINT))
    monkeypatch.setattr(fleet, "pool_for", lambda options, place: pool)
    with pytest.raises(KeyboardInterrupt):
        fleet.carry_out(None, results, [job.order for job in jobs])
    assert closed == [signal.SIG_IGN] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "interrupted; 2 jobs are not done, and the same command goes on" in capsys.readouterr().out
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_ray_is_started_again_where_a_busy_machine_was_too_slow_for_it_and_for_this_machine_alone(fleet, monkeypatch):
    given, failing = [], 1

    def init(**options):
        given.append(options)
        if len(given) <= failing:
            raise Exception("The current node timed out during startup")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init, shutdown=lambda: None))
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "as it was")
    _, folder = fleet.start_ray(None)
    assert len(given) == 2 and given[1]["_temp_dir"] == folder != given[0]["_temp_dir"] and not Path(given[0]["_temp_dir"]).exists()
    assert given[1]["object_store_memory"] <= 100 * 2**20 and given[1]["include_dashboard"] is False
    Path(folder).rmdir()
    said = {name: os.environ[name] for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE")}
    assert list(said.values()) == ["0", "0", "token"] and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    failing = 99
    with pytest.raises(fleet.WorkflowError, match="does not start on this machine .*timed out.*--workers 1 does without"):
        fleet.start_ray(None)


# ----------------------------------------------------------------------------------------------------------- the results


def finished(fleet, results, job, content: bytes = b"12345") -> None:
    results.place.write(f"worlds/{job.key}/walk.mp4", content)
    row = {"key": job.key, "status": "done", "seconds": 2.0, "worker": "here/0", "attempts": 1, "files": {"walk.mp4": 5}}
    results.add(job.order, row, [])


@pytest.mark.parametrize("is_url", [False, True])
def test_what_is_done_is_found_by_key_and_what_was_lost_is_missing(fleet, tmp_path, is_url):
    place = f"file://{tmp_path}/out" if is_url else str(tmp_path / "out")
    done, lost, cut, failed, new = jobs = [fleet.Job(seed=n) for n in range(5)]
    results = fleet.Results(place, jobs)
    assert results.missing(False) == jobs
    for job in (done, lost):
        finished(fleet, results, job)
    finished(fleet, results, cut, b"123")
    results.add(failed.order, {"key": failed.key, "status": "failed", "attempts": 3, "error": "no"}, ["attempt 1: no"])
    (tmp_path / "out" / "worlds" / lost.key / "walk.mp4").unlink()
    again = fleet.Results(place, jobs)
    assert again.missing(False) == [lost, cut, new] and again.missing(True) == [lost, cut, failed, new]
    again.write()
    table = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["key"], row["status"], row["seed"]) for row in table] == [(done.key, "done", 0), (failed.key, "failed", 3)]
    assert (tmp_path / "out" / "failed" / f"{failed.key}.log").read_text() == "attempt 1: no"
    (tmp_path / "out" / "results" / f"{done.key}.json").write_text('{"key": ')  # what a crash of the disk leaves
    assert fleet.Results(place, jobs).missing(False) == [done, lost, cut, new]


def test_the_page_shows_every_world_and_says_what_was_set_aside(fleet, tmp_path):
    done, failed = fleet.Job(photo="/a/<room>.png", path="spiral", prompt="a & b"), fleet.Job(seed=3)
    results = fleet.Results(str(tmp_path), [done, failed])
    finished(fleet, results, done)
    results.add(failed.order, {"key": failed.key, "status": "failed", "attempts": 3, "error": "<no>"}, ["log"])
    results.write()
    page = (tmp_path / "index.html").read_text()
    assert f'src="worlds/{done.key}/thumbnail.jpg"' in page and "1 of 2 done, 1 set aside" in page
    assert f'href="failed/{failed.key}.log"' in page and "&lt;no&gt;" in page and "a &amp; b" in page and "<room>" not in page


def test_a_world_is_sent_chunk_by_chunk_and_its_list_after_what_it_lists(fleet, tmp_path):
    place, here = fleet.fleet_worker.Place(f"file://{tmp_path}/there"), tmp_path / "here"
    (here / "world").mkdir(parents=True)
    (here / "world" / "a.safetensors").write_bytes(b"one")
    (here / "world" / "world.json").write_text("lists a")
    (here / "world" / "b.safetensors.x.partial").write_bytes(b"half")
    (here / "walk.mp4").write_bytes(b"video")
    order, sent = [], {}
    put, write = place._put, place.write
    place._put = lambda inner, name, file: (order.append(inner.name), put(inner, name, file))
    place.write = lambda name, content: (order.append(name.rpartition("/")[2]), write(name, content))
    place.send(here, "worlds/K", sent, (".safetensors",))
    assert order == ["a.safetensors", "world.json"]
    place.send(here, "worlds/K", sent, (".safetensors",))
    assert len(order) == 2  # nothing is new
    place.send(here, "worlds/K", sent)
    place.fetch("worlds/K", tmp_path / "back")
    back = {file.relative_to(tmp_path / "back").as_posix() for file in (tmp_path / "back").rglob("*") if file.is_file()}
    assert back == {"world/a.safetensors", "world/world.json", "walk.mp4"}


def test_no_job_ends_the_worker_whatever_a_driver_or_a_file_raises(fleet, tmp_path, monkeypatch):
    worker = fleet.fleet_worker.Worker(f"file://{tmp_path}/out", str(tmp_path / "base"), 0)
    (tmp_path / "base" / "input").mkdir(parents=True)
    (tmp_path / "base" / "server.log").write_text("before\n")
    worker.server = SimpleNamespace(process=SimpleNamespace(poll=lambda: None), log_path=tmp_path / "base" / "server.log")
    worker.inputs = set()

    def fetch(name, folder):
        (tmp_path / "base" / "input" / "left.png").touch()
        with worker.server.log_path.open("a") as log:
            log.write("while it ran\n")
        raise KeyError("no such bucket")

    monkeypatch.setattr(worker.place, "fetch", fetch)
    said = worker.run({**fleet.Job().order, "content": {}})
    assert said == {"error": "KeyError: 'no such bucket'", "log": "while it ran\n"}
    assert not list((tmp_path / "base" / "input").iterdir())


def test_a_server_ends_with_whoever_started_it_even_if_that_was_killed(launcher):
    import psutil

    starts = (
        "import subprocess, sys, time; server = subprocess.Popen(['sleep', '60']); "
        f"guard = subprocess.Popen([sys.executable, '-S', '-c', {launcher.GUARD!r}, str(server.pid)], stdin=subprocess.PIPE); "
        "print(server.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE, text=True) as starter:
        server = psutil.Process(int(starter.stdout.readline()))
        assert server.is_running() and server.status() != psutil.STATUS_ZOMBIE
        starter.kill()
    for _ in range(100):
        if not server.is_running() or server.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    server.kill()
    raise AssertionError("it runs on")


# ------------------------------------------------------------------------------------------------ with Ray and ComfyUI


def test_two_workers_one_killed_and_a_job_that_cannot_succeed_leave_all_other_worlds_done(bench, tmp_path):
    import psutil

    jobs, output = bench.write_jobs(tmp_path, 2, PRESETS), tmp_path / "out"
    fleet = bench.begin(jobs, output, "--workers", "2")
    servers = bench.kill_a_worker(fleet, output)
    said, _ = fleet.communicate(timeout=400)
    rows = bench.rows_of(output)
    done = [row for row in rows.values() if row["status"] == "done"]
    failed = [row for row in rows.values() if row["status"] == "failed"]
    assert servers and fleet.returncode == 1 and (len(done), len(failed)) == (4, 1), said
    assert sorted(row["attempts"] for row in done) == [1, 1, 1, 2] and "worker was lost" in said
    assert max(row["resumed_chunks"] for row in done if row["attempts"] == 2) > 0, "it began from the start"
    assert not [pid for pid in servers if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert "no_such_move" in (output / "failed" / f"{failed[0]['key']}.log").read_text()
    for row in done:
        with Image.open(output / "worlds" / row["key"] / "thumbnail.jpg") as picture:
            assert picture.size == bench.SIZE

    (output / "worlds" / done[0]["key"] / "thumbnail.jpg").unlink()  # the second run makes this again and nothing else
    before = {name: (output / name).stat().st_mtime_ns for name in bench.digests(output)}
    again = bench.begin(jobs, output, "--workers", "1")
    said, _ = again.communicate(timeout=300)
    assert "5 jobs, 1 to do, 1 were set aside before" in said
    assert bench.rows_of(output)[done[0]["key"]]["resumed_chunks"] == 3
    others = {name: time_ for name, time_ in before.items() if done[0]["key"] not in name}
    assert others == {name: (output / name).stat().st_mtime_ns for name in others}
