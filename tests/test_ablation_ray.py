"""The executor on Ray against the local one, on real local instances of two workers; and what a death costs."""

import json
import os
import platform
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

import test_ablation
from lora_da_core.ablation import make_grid, plan, run_grid
from lora_da_core.ablation.dispatch import Dispatch, Message, Pool, Worker
from lora_da_core.cli import app
from lora_da_core.errors import LoraDAError, ModelError, OptionError, StorageError
from test_ablation import content

no_loading = test_ablation.no_loading

BETAS = [0.1, 0.3, 1.0, 3.0]

GRID = [
    {"estimator": ["kfac", "ekfac"], "beta": BETAS, "rank": [2]},
    {"baseline": ["eva", "default"], "rank": [2, 17]},
]
"""Three groups of four cells; rank 17 is above what the tiny model has, so those fail."""

MEASURED = {"seconds", "phases", "spent", "peak_bytes", "memory", "fidelity_seconds", "curves"}
"""Fields of a record that hold times or bytes."""


def what_was_found(records):
    """Everything of the records that must not depend on where they were made."""
    return {
        record["cell"]: {name: value for name, value in record.items() if name not in MEASURED}
        | {"losses": [curve["losses"] for curve in record["curves"]]}
        for record in records
    }


def numbers(records):
    return {(record["estimator"], record["beta"]): (record["digest"], record["angle"]) for record in records}


def lines_of(out):
    return (out / "results.jsonl").read_text().splitlines()


def cells_of(out):
    return [json.loads(line)["cell"] for line in lines_of(out)]


def processes_below(parent):
    """Ids and command lines of a process's descendants."""
    parents, commands = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    found, new = {}, {parent}
    while new:
        new = {pid for pid, above in parents.items() if above in new and pid not in found}
        found |= {pid: commands.get(pid, "") for pid in new}
    return found


def actors_below(parent):
    return [pid for pid, command in processes_below(parent).items() if command.startswith("ray::_Actor")]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


class TestOwnInstance:
    def test_it_gives_what_the_local_run_gives_and_leaves_nothing_behind(self, world, tmp_path, monkeypatch):
        import ray

        monkeypatch.chdir(world)  # relative paths begin here on the workers too
        tune = {"steps": 3, "learning_rates": [1e-2], "eval_steps": [0, 3]}
        given = content(world, GRID, finetune=tune, model="./model", data="data.jsonl")
        local = run_grid(given, tmp_path / "local")
        variables, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
        told = []
        found = run_grid(given, tmp_path / "ray", executor="ray", jobs=2, on_record=lambda *news: told.append(news[1]))
        assert not ray.is_initialized()
        assert actors_below(os.getpid()) == []
        assert dict(os.environ) == variables and signal.getsignal(signal.SIGTERM) == handler
        assert told == list(range(1, 13))
        assert sorted(cells_of(tmp_path / "ray")) == sorted(record["cell"] for record in local)
        ours, theirs = what_was_found(found), what_was_found(local)
        assert ours == theirs
        assert Counter(record["status"] for record in found) == {"done": 10, "failed": 2}
        assert all(record["angle"] > 0 for record in found if record["status"] == "done")
        assert len({record["digest"] for record in found if record["digest"]}) == 8
        entries = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("local", "ray")]
        assert entries[0] == entries[1]


CLUSTER = """
import json, os, sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
auth = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
print(json.dumps({"RAY_ADDRESS": ray.get_runtime_context().gcs_address, **auth}), flush=True)
sys.stdin.readline()
print(sum(node["Alive"] for node in ray.nodes()), ray.available_resources().get("CPU"), flush=True)
"""


class TestCluster:
    @pytest.fixture(scope="class")
    @classmethod
    def cluster(cls, tmp_path_factory):
        """A Ray of two CPUs that is somebody else's: it was begun in another process, in another directory."""
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, cwd=tmp_path_factory.mktemp("elsewhere"),
        )  # fmt: skip
        yield process.pid, json.loads(process.stdout.readline())
        ready, _ = process.communicate("\n", timeout=60)
        assert ready.split() == ["1", "2.0"]  # it lives, and nothing of it is in use

    @pytest.fixture(scope="class")
    @classmethod
    def alone(cls, world, tmp_path_factory):
        """Where the local executor has run the same."""
        out = tmp_path_factory.mktemp("local") / "out"
        run_grid(content(world, {"estimator": ["kfac", "identity"], "beta": BETAS, "rank": [2]}), out)
        return out

    @pytest.fixture(autouse=True)
    def joined(self, cluster, monkeypatch, no_cluster):
        driver, variables = cluster
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        import ray  # which settles how it authenticates for as long as the process lives

        yield driver
        assert not ray.is_initialized()

    def test_a_killed_worker_s_group_goes_on_elsewhere(self, world, tmp_path, joined, alone):
        given, out = content(world, {"estimator": ["kfac", "identity"], "beta": BETAS, "rank": [2]}), tmp_path / "out"
        out.mkdir()
        begun = lines_of(alone)[:2]
        (out / "results.jsonl").write_text(begun[0] + "\n" + begun[1][:40])  # a local run that was cut off
        killed, kept = [], []

        def kill(record, done, total):
            if not killed:
                killed.extend(actors_below(joined))
                kept.extend(lines_of(out))
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

        found = run_grid(given, out, executor="ray", jobs=2, on_record=kill)
        assert 1 <= len(killed) <= 2 and len(kept) == 2
        assert lines_of(out)[:2] == kept and kept[0] == begun[0]
        assert len(set(cells_of(out))) == len(lines_of(out)) == len(found) == 8
        assert {record["status"] for record in found} == {"done"}
        # The group that had a finished cell is estimated again for the others, so two of these did not reuse.
        again = Counter(json.loads(line)["group"] for line in lines_of(out)[1:] if not json.loads(line)["reused"])
        assert again[json.loads(kept[1])["group"]] == 2
        assert numbers(found) == numbers(map(json.loads, lines_of(alone)))

    def test_an_interrupted_run_ends_its_workers_and_goes_on(self, world, tmp_path, joined, alone, monkeypatch):
        monkeypatch.chdir(world)  # where relative paths begin, on the cluster's workers too
        given = content(world, {"estimator": ["kfac"], "beta": BETAS, "rank": [2]}, model="model", data="data.jsonl")
        out, there = tmp_path / "out", []

        def interrupt(record, done, total):
            there.extend(actors_below(joined))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_grid(given, out, executor="ray", on_record=interrupt)
        kept = lines_of(out)
        assert len(kept) == len(there) == 1
        found = run_grid(given, out)
        assert lines_of(out)[:1] == kept and len(set(cells_of(out))) == len(lines_of(out)) == len(found) == 4
        theirs = numbers(map(json.loads, lines_of(alone)))
        assert numbers(found) == {key: value for key, value in theirs.items() if key[0] == "kfac"}

    @pytest.fixture
    def session(self, joined):
        import ray

        handler = signal.getsignal(signal.SIGTERM)
        ray.init(log_to_driver=False, logging_level="ERROR")
        yield ray
        assert ray.is_initialized()
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)

    def test_in_an_open_session_a_missing_model_or_gpu_is_one_error(self, world, tmp_path, joined, session):
        with pytest.raises(ModelError, match=rf"'./nowhere' does not exist.* \(on node {platform.node()}\)"):
            run_grid(content(world, {"rank": [2]}, model="./nowhere"), tmp_path / "out", executor="ray")
        with pytest.raises(OptionError, match=r"no node of the Ray cluster has what each job asks for: 1 CPU, 1 GPU"):
            run_grid(content(world, {"rank": [2]}, device="cuda"), tmp_path / "out", executor="ray")
        assert not (tmp_path / "out" / "results.jsonl").exists()

    def test_one_that_does_not_answer_is_an_error_at_once(self, world, tmp_path, monkeypatch, no_loading):
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        with pytest.raises(LoraDAError, match=r"Ray cluster at 127\.0\.0\.1:1 cannot be joined: .*refused"):
            run_grid(content(world, {"rank": [2]}), tmp_path / "out", executor="ray")


class Scripted(Pool):
    """Workers that do as a script says: how many cells each finishes before it dies; None is all there are."""

    def __init__(self, retries, *lives):
        self.retries, self._lives = retries, list(lives)
        self.workers = []

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def start(self):
        self.workers.append(ScriptedWorker(self._lives.pop(0)))
        return self.workers[-1]

    def ready(self, workers):
        assert not any(worker.closed for worker in workers)
        return [workers[-1]]


class ScriptedWorker(Worker):
    def __init__(self, life):
        super().__init__()
        self.life, self.closed, self.ran = life, False, []
        self._next = Message("loaded", {"model": {"source": "m"}, "data": {"source": "d"}})
        if life == "dies loading":
            self._next = Message("died", "it broke")

    def _send(self, group):
        self._left = [cell.id for cell in group.cells]
        self._advance()

    def _advance(self):
        if self.life == len(self.ran) and self.life is not None:
            self._next = Message("died", "it broke")
        elif self._left:
            self.ran.append(self._left[0])
            self._next = Message("record", {"cell": self._left.pop(0), "status": "done"})
        else:
            self._next = Message("idle")

    def receive(self):
        message = self._next
        if message.kind == "record":
            self._advance()
        return message

    def close(self):
        self.closed = True


class TestDeaths:
    def run(self, world, tmp_path, pool, jobs=1):
        grid = make_grid(content(world, {"estimator": ["kfac", "identity"], "beta": BETAS, "rank": [2]}))
        records = list(Dispatch(pool, grid.groups(), tmp_path).records(jobs))
        assert sorted(record["cell"] for record in records) == sorted(cell.id for cell in grid.cells)
        assert all(worker.closed for worker in pool.workers)
        return records

    def test_a_group_that_always_kills_is_given_up_and_the_others_are_done(self, world, tmp_path):
        pool = Scripted(2, 1, 0, 0, None)
        records = self.run(world, tmp_path, pool)
        assert [len(worker.ran) for worker in pool.workers] == [1, 0, 0, 4]
        failed = [record for record in records if record["status"] == "failed"]
        assert len(failed) == 3 and len({record["group"] for record in failed}) == 1
        assert {record["error"] for record in failed} == {"it broke, 3 times in a row; it may have run out of memory"}

    def test_a_finished_cell_starts_the_count_anew(self, world, tmp_path):
        pool = Scripted(1, 1, 2, 1, 1, None)
        records = self.run(world, tmp_path, pool)
        assert {record["status"] for record in records} == {"done"}
        ran = [cell for worker in pool.workers for cell in worker.ran]
        assert len(ran) == len(set(ran)) == 8

    def test_without_retries_the_first_death_fails_the_group(self, world, tmp_path):
        records = self.run(world, tmp_path, Scripted(0, 2, None))
        failed = [record["error"] for record in records if record["status"] == "failed"]
        assert failed == ["it broke; it may have run out of memory"] * 2

    def test_where_no_worker_can_load_it_ends(self, world, tmp_path):
        pool = Scripted(2, *["dies loading"] * 4)
        with pytest.raises(StorageError, match="it broke while it loaded the model; take fewer jobs"):
            self.run(world, tmp_path, pool, jobs=2)
        assert len(pool.workers) == 4 and all(worker.closed for worker in pool.workers)

    def test_those_that_have_loaded_do_the_work_of_one_that_cannot(self, world, tmp_path):
        pool = Scripted(1, None, *["dies loading"] * 2)
        records = self.run(world, tmp_path, pool, jobs=2)
        assert {record["status"] for record in records} == {"done"} and len(pool.workers[0].ran) == 8

    def test_an_error_that_all_would_meet_ends_it(self, world, tmp_path):
        pool = Scripted(2, None, None)
        start = pool.start

        def wrong():
            worker = start()
            worker._next = Message("error", ModelError("no such model"))
            return worker

        pool.start = wrong
        with pytest.raises(ModelError, match="no such model"):
            self.run(world, tmp_path, pool, jobs=2)
        assert all(worker.closed for worker in pool.workers)


class TestWrongUse:
    def test_without_ray_it_says_how_to_install_it(self, world, tmp_path, monkeypatch, no_loading):
        monkeypatch.setitem(sys.modules, "ray", None)
        given = content(world, {"rank": [2]})
        for refused in (run_grid, plan):
            with pytest.raises(OptionError, match=r"pip install 'lora-da-core\[ray\]'"):
                refused(given, tmp_path / "out", executor="ray")
        assert not (tmp_path / "out").exists()
        grid = tmp_path / "grid.toml"
        grid.write_text("[run]\nmodel = 'm'\ndata = 'd'\n[grid]\nrank = [2]\n")
        arguments = ["ablate", str(grid), "--output", str(tmp_path / "out"), "--executor", "ray", "--dry-run"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        assert "pip install 'lora-da-core[ray]'" in result.stderr

    def test_the_default_does_not_import_it(self, world, tmp_path):
        code = (
            "import sys; sys.modules['ray'] = None\n"
            "from lora_da_core.ablation import plan\n"
            f"print(plan({content(world, {'rank': [2]})!r}, {str(tmp_path / 'out')!r}, jobs=2).cells)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "1\n", done.stderr

    @pytest.mark.parametrize(
        ("executor", "run", "address", "message"),
        [
            ("slurm", {}, None, "executor is 'slurm'; it must be 'local' or 'ray'"),
            ("ray", {"device": "cuda:1"}, None, "device is 'cuda:1', but Ray chooses"),
            ("ray", {}, "ray://head:10001", "RAY_ADDRESS is 'ray://head:10001'; give the cluster's own address"),
        ],
    )
    def test_it_is_refused_before_anything_is_loaded(
        self, world, tmp_path, monkeypatch, no_loading, executor, run, address, message
    ):
        if address:
            monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(OptionError, match=message):
            run_grid(content(world, {"rank": [2]}, **run), tmp_path / "out", executor=executor)
        assert not (tmp_path / "out").exists()
