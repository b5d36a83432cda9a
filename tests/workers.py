"""Run tests side by side: most of them wait, and one core has time for several that do.

pytest starts as ever, collects, and then forks. Each worker runs the tests it is
handed, one after the other, and sends what became of them; pytest itself reports it,
so that dots, failures, `-x` and `--durations` are as ever. Only the order differs.
The tests themselves know nothing of it. Where a test's output is wanted on the
terminal, in a debugger, and where there is no fork, they run one by one as before.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
import warnings
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

PER_CORE = 3  # workers; with more, tests begin to wait for a core instead of each other
GROUP = 12  # tests at most that stay together for the sake of a fixture that they share
GRACE = 10.0  # seconds for a worker to come to an end by itself


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the number of workers be chosen."""
    parser.addoption(
        "--workers",
        type=int,
        default=PER_CORE * min(4, os.cpu_count() or 1),
        help="run so many tests side by side (default: %(default)s; 1: one after the other)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run all tests by workers, or leave it to pytest to run them."""
    count = min(_workers_allowed(session.config), len(session.items))
    if count < 2 or session.testsfailed:  # a failure here is one of collecting
        return None
    Run(session).run(count)
    return True


def _workers_allowed(config: pytest.Config) -> int:
    """Return how many workers there may be; none for options that want one process."""
    alone = ("collectonly", "usepdb", "trace", "setuponly", "setupshow", "setupplan")
    if any(config.getoption(option, False) for option in alone):
        return 0
    if config.getoption("capture", "no") not in ("fd", "sys") or not hasattr(os, "fork"):
        return 0
    return config.getoption("workers", 0) if threading.active_count() == 1 else 0


def _groups(items: list[pytest.Item]) -> deque[deque[int]]:
    """Return the places of the tests that stay together, what takes long first."""
    groups: list[deque[int]] = []
    last = None
    for place, item in enumerate(items):
        shared = (item.parent, _shares_fixtures(item), _is_long(item))
        if shared[1] and shared == last and len(groups[-1]) < GROUP:
            groups[-1].append(place)
        else:
            groups.append(deque([place]))
        last = shared
    return deque(sorted(groups, key=lambda group: not _is_long(items[group[0]])))


def _shares_fixtures(item: pytest.Item) -> bool:
    """Tell whether a test wants a fixture that is made once for several, but not for all."""
    fixtures = getattr(item, "_fixtureinfo", None)
    wanted = fixtures.name2fixturedefs.values() if fixtures else ()
    return any(found[-1].scope in ("class", "module", "package") for found in wanted)


def _is_long(item: pytest.Item) -> bool:
    return item.get_closest_marker("long") is not None


class Run:
    """All tests of a session, as the process sees them that reports them."""

    def __init__(self, session: pytest.Session) -> None:
        self.session = session
        self.config = session.config
        self._waiting = _groups(session.items)  # groups that no worker has
        self._workers: list[Worker] = []

    def run(self, count: int) -> None:
        """Have `count` workers run the tests; raise as pytest does where it stops early."""
        if reporter := self.config.pluginmanager.getplugin("terminalreporter"):
            reporter.showfspath = False  # tests of all files come by turns
        if factory := getattr(self.config, "_tmp_path_factory", None):
            factory.getbasetemp()  # one folder for all
        try:
            for _ in range(min(count, len(self._waiting))):
                self._start()
            while self._workers:
                self._listen()
        finally:
            for worker in self._workers:  # all of them first, to end side by side
                worker.connection.close()
            for worker in self._workers:
                worker.end()
        if self.session.shouldfail:
            raise self.session.Failed(self.session.shouldfail)
        if self.session.shouldstop:
            raise self.session.Interrupted(self.session.shouldstop)

    def _start(self) -> None:
        worker = Worker(self.session, [other.connection for other in self._workers])
        self._workers.append(worker)
        self._hand_on(worker)

    def _hand_on(self, worker: Worker) -> None:
        """Give a worker more to do, or the word that there is no more."""
        stops = self.session.shouldfail or self.session.shouldstop
        worker.group = deque() if stops or not self._waiting else self._waiting.popleft()
        worker.send(list(worker.group))

    def _listen(self) -> None:
        """Take what the workers say; look after those that went without a word, too."""
        ready = multiprocessing.connection.wait([w.connection for w in self._workers], 1.0)
        for worker in list(self._workers):
            if worker.connection in ready or not worker.process.is_alive():
                try:
                    self._take(worker, *worker.receive())
                except (EOFError, OSError):
                    self._bury(worker)

    def _take(self, worker: Worker, result: tuple[list[Any], list[Any]], stop: Any) -> None:
        reports, warned = result
        worker.last = self.session.items[worker.group.popleft()]
        self.session.shouldfail = self.session.shouldfail or stop
        for about in warned:
            self.config.hook.pytest_warning_recorded.call_historic(kwargs=about)
        revive = self.config.hook.pytest_report_from_serializable
        self._report(worker.last, [revive(config=self.config, data=data) for data in reports])
        if self.session.shouldfail or self.session.shouldstop:
            for other in self._workers:
                other.send([])
        elif not worker.group:
            self._hand_on(worker)

    def _report(self, item: pytest.Item, reports: list[pytest.TestReport]) -> None:
        """Tell of a test as if it had just run here."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def _bury(self, worker: Worker) -> None:
        """Take leave of a worker; if it died, its test failed, and another does the rest."""
        self._workers.remove(worker)
        status, output = worker.end()
        if status == 0:
            return
        if worker.group:
            worker.last = self.session.items[worker.group.popleft()]
        assert worker.last is not None, f"a worker could not start:\n{output}"
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        text = f"the process that ran this test ended with {how}\n\n{output}"
        self._report(worker.last, [_failure(worker.last, text)])
        stops = self.session.shouldfail or self.session.shouldstop
        if worker.group and not stops:
            self._waiting.appendleft(worker.group)
        if self._waiting and not stops:
            self._start()


def _failure(item: pytest.Item, text: str) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")


class Worker:
    """A process that runs tests, as the one that reports them sees it."""

    def __init__(self, session: pytest.Session, others: list[Connection]) -> None:
        self.group: deque[int] = deque()  # the places of its tests; it is at the first
        self.last: pytest.Item | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed at its end
        context = multiprocessing.get_context("fork")
        self.connection, far = context.Pipe()
        self.process = context.Process(
            target=_work, args=(session, far, [self.connection, *others], self._output.fileno())
        )
        self.process.start()
        far.close()  # so that the end of the worker is the end of the connection

    def send(self, places: list[int]) -> None:
        """Say which tests are next; with none, that it is over."""
        with contextlib.suppress(OSError):  # if it died, that is noticed by listening to it
            self.connection.send(places)

    def receive(self) -> Any:
        """Return what became of a test; raise EOFError when there is nothing more to come."""
        if not self.connection.poll():
            raise EOFError
        return self.connection.recv()

    def end(self) -> tuple[int, str]:
        """Wait for its end; return its exit status, and what it wrote beside its tests."""
        self.connection.close()
        for urge in (signal.SIGINT, signal.SIGKILL):
            self.process.join(GRACE)
            if self.process.is_alive() and self.process.pid:
                os.kill(self.process.pid, urge)
        self.process.join()
        with self._output as file:
            file.seek(0)
            return self.process.exitcode or 0, file.read().decode("utf-8", "backslashreplace")


# --- In a worker -------------------------------------------------------------


def _work(session: pytest.Session, near: Connection, far: list[Connection], output: int) -> None:
    """Run the tests that are asked for, until there are no more."""
    for connection in far:  # theirs who forked us; open here, none would ever seem to end
        connection.close()
    _write_to(output, session.config)
    sender = Sender()
    session.config.pluginmanager.register(sender)
    sender.warned.clear()  # what was there already, and is known
    try:
        while places := near.recv():
            items = [session.items[place] for place in places]
            # Behind the last, only what is made for the whole session is kept.
            for item, following in zip(items, [*items[1:], session], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                near.send((sender.take(session.config), session.shouldfail))
                if near.poll() and following is not session:
                    break  # the run stops
    except EOFError:
        pass  # nobody wants to know any more
    finally:
        session._setupstate.teardown_exact(None)
        session.config._ensure_unconfigure()  # which looks for what was left to the garbage


def _write_to(output: int, config: pytest.Config) -> None:
    """Have all that is not captured of a test end up in a file."""
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()  # its files are shared with who forked us
    for number in (1, 2):
        os.dup2(output, number)
    if faulthandler.is_enabled():
        faulthandler.enable(file=output)
    capture.start_global_capturing()
    capture.suspend_global_capture()


class Sender:
    """The part of pytest that keeps reports to be sent, instead of showing them."""

    def __init__(self) -> None:
        self._reports: list[pytest.TestReport] = []
        self.warned: list[dict[str, Any]] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item) -> bool:
        """Run a test and keep quiet about it; what wraps this, as a timeout does, holds."""
        self._reports = runtestprotocol(item, log=False, nextitem=nextitem)
        return True

    def pytest_warning_recorded(
        self,
        warning_message: warnings.WarningMessage,
        when: str,
        nodeid: str,
        location: tuple[str, int, str] | None,
    ) -> None:
        """Keep a warning that is no error."""
        warning_message.source = None  # whatever it is about stays here
        about = {"warning_message": warning_message, "when": when}
        self.warned.append({**about, "nodeid": nodeid, "location": location})

    def take(self, config: pytest.Config) -> tuple[list[Any], list[dict[str, Any]]]:
        """Return the reports of a test, in a form to be sent, and what was warned of."""
        pack = config.hook.pytest_report_to_serializable
        reports = [pack(config=config, report=report) for report in self._reports]
        warned, self.warned = self.warned, []
        return reports, warned
