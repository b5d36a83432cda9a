"""Measure the chat server beside the tutorial's, ngircd and miniircd.

    python tests/bench                                  everything, about a quarter of an hour
    python tests/bench --scenario office --server ours  one scenario, one server
    python tests/bench --scale 0.02 --seconds 0.5       a smoke test of everything

Prints a table on standard output and its progress on standard error. Needs
Linux (/proc, epoll) and nothing installed; ngircd and miniircd take part when
they are. All traffic stays within 127.0.0.0/8. A durable history is written
under TMPDIR: for honest figures that must be a disk, not memory.
"""

import argparse
import json
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import table
from load import Job
from servers import (
    CONTENDERS,
    HERE,
    NGIRCD,
    OURS,
    Contender,
    Server,
    Setup,
    StartError,
    bound_child,
    cores,
    environment,
    find_program,
    make_certificate,
    running,
    running_several,
)
from table import Row

REPEATS = 5
"""Starts of a program of which the median is taken."""

SPARE = 200
"""File descriptors kept back from the clients."""

LEAST = 3
"""Clients of a scenario however far it is scaled down."""

LOAD_PATIENCE = 120.0
"""Seconds beyond joining and talking after which a load is given up."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A room and what happens in it; `rate` is lines a second of all, 0 a flood.

    `beside` names a scenario whose figure for the same server this one's is held
    against; `ours_only`, why no other server takes part.
    """

    name: str
    about: str
    kind: str = "talk"
    clients: int = 0
    senders: int = 0
    rate: float = 0
    watchers: int = 20
    stuck: int = 0
    storm: bool = False
    history: bool = False
    tls: bool = False
    beside: str = ""
    ours_only: bool = False
    several: bool = False

    @property
    def flood(self) -> bool:
        return self.senders > 0 and not self.rate


SCENARIOS = (
    Scenario("start", "from the start of the process until it listens", kind="start"),
    Scenario("quiet", "10 clients, 20 lines/s in all", clients=10, senders=10, rate=20),
    Scenario("office", "100 clients, 500 lines/s in all", clients=100, senders=100, rate=500),
    Scenario(
        "office-tls",
        "the office over TLS",
        clients=100,
        senders=100,
        rate=500,
        watchers=100,
        tls=True,
        beside="office",
        ours_only=True,
    ),
    Scenario("hall", "1,000 clients, 500 lines/s in all", clients=1000, senders=1000, rate=500),
    Scenario(
        "stadium",
        "10,000 clients, 10 lines/s in all",
        clients=10_000,
        senders=10_000,
        rate=10,
        watchers=50,
    ),
    Scenario("flood-1", "1 client floods 100", clients=101, senders=1, watchers=4),
    Scenario("flood-100", "100 clients flood each other", clients=100, senders=100, watchers=4),
    Scenario(
        "flood-stuck",
        "1 client floods 101, until one of them stops reading",
        clients=101,
        senders=1,
        watchers=4,
        stuck=1,
    ),
    Scenario(
        "flood-durable",
        "1 client floods 100, every line committed to disk before it is sent",
        clients=101,
        senders=1,
        watchers=4,
        history=True,
        beside="flood-1",
        ours_only=True,
    ),
    Scenario(
        "machines-quiet",
        "10 clients of one room, 20 lines/s in all, on one server and on several",
        clients=10,
        senders=10,
        rate=20,
        history=True,
        several=True,
    ),
    Scenario(
        "machines",
        "1,000 clients of one room, 500 lines/s in all, on one server and on several",
        clients=1000,
        senders=1000,
        rate=500,
        history=True,
        several=True,
    ),
    Scenario(
        "machines-flood",
        "1 client floods 100 of one room, on one server and on several",
        clients=101,
        senders=1,
        watchers=4,
        history=True,
        several=True,
    ),
    Scenario("storm", "1,000 clients join at once", kind="join", clients=1000, storm=True),
)


@dataclass(slots=True)
class Plan:
    """What was asked for on the command line."""

    scenarios: list[Scenario]
    contenders: list[Contender]
    seconds: float
    scale: float
    join_deadline: float
    program: Path
    json: Path | None


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# One measurement


def clients_of(scenario: Scenario, plan: Plan) -> int:
    """Scale the room, and keep it within the file descriptors that there are."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE
    return min(max(LEAST, round(scenario.clients * plan.scale)), limit)


def at_once(scenario: Scenario, contender: Contender, plan: Plan) -> int:
    """Say how many connect at a time: as many as fit the server's queue, or all in a storm."""
    clients = clients_of(scenario, plan) + scenario.stuck
    return clients if scenario.storm else min(clients, contender.queue)


def setup_for(scenario: Scenario, contender: Contender, plan: Plan) -> Setup:
    return Setup(
        program=plan.program,
        clients=clients_of(scenario, plan) + scenario.stuck,
        at_once=at_once(scenario, contender, plan),
        history=scenario.history,
        tls=scenario.tls,
    )


def job_for(scenario: Scenario, contender: Contender, server: Server, plan: Plan) -> Job:
    clients = clients_of(scenario, plan)
    authority = server.log.parent / "certificate.pem"
    return Job(
        title=f"{scenario.name} / {contender.name}",
        port=server.port,
        pid=server.pid,
        more=server.more,
        dialect=contender.dialect,
        echo=contender.echo,
        clients=clients,
        senders=min(scenario.senders, clients),
        rate=scenario.rate,
        watchers=scenario.watchers,
        stuck=scenario.stuck,
        at_once=at_once(scenario, contender, plan),
        seconds=plan.seconds,
        join_deadline=plan.join_deadline,
        authority=str(authority) if scenario.tls else "",
    )


def run_load(job: Job) -> dict[str, float | str]:
    """Let a process of its own do the job; return its figures, or `failed` with the reason."""
    deadline = job.join_deadline + 4 * job.seconds + LOAD_PATIENCE
    process = subprocess.Popen(
        [sys.executable, str(HERE / "load.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=bound_child(cores()[1]),
    )
    try:
        output, _ = process.communicate(json.dumps(asdict(job)).encode(), deadline)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {deadline:.0f} s"}
    finally:
        process.kill()
        process.wait()
    figures: dict[str, float | str] = json.loads(output or '{"failed": "the load broke down"}')
    return figures


def measure(scenario: Scenario, contender: Contender, plan: Plan) -> Row:
    """Start the server, let the load at it, and make a row of what comes back."""
    row = Row(scenario.name, contender.name)
    setup = setup_for(scenario, contender, plan)
    try:
        with tempfile.TemporaryDirectory(prefix="chat-bench-") as name:
            folder = Path(name)
            if scenario.tls:
                make_certificate(folder)
            run_it = running if contender.servers == 1 else running_several
            with run_it(contender, setup, folder) as server:
                fill(row, run_load(job_for(scenario, contender, server, plan)))
                if last_words := server.last_words():
                    row.remarks.append(last_words)
    except (StartError, OSError, subprocess.SubprocessError) as error:
        row.failed = str(error)
    remark(row, scenario)
    return row


def fill(row: Row, figures: dict[str, float | str]) -> None:
    row.failed = str(figures.pop("failed", ""))
    row.figures = {key: value for key, value in figures.items() if not isinstance(value, str)}


def remark(row: Row, scenario: Scenario) -> None:
    row.remarks += table.remarks_on(row.figures)
    if scenario.flood and not row.failed and not row.figures.get("deliveries"):
        row.failed = "no line got through"
    if scenario.stuck and not row.failed:
        fate = "dropped" if row.figures.get("stuck_dropped") else "kept"
        share = row.figures.get("of_before", 0.0)
        row.remarks.append(f"{share:.2f} of before it stopped; the stuck reader was {fate}")
    wanted = scenario.clients + scenario.stuck
    if not row.failed and row.figures.get("clients", wanted) < wanted:
        row.remarks.append(f"with {row.figures['clients']:,.0f} clients")


def measure_start(contender: Contender, plan: Plan) -> Row:
    """Take the median of several starts; for ours, of the client's too."""
    row = Row("start", contender.name)
    setup = Setup(plan.program, LEAST, LEAST)
    try:
        row.figures["listens_ms"] = statistics.median(
            start_once(contender, setup) for _ in range(REPEATS)
        )
        if contender is OURS:
            row.figures["client_help_ms"] = statistics.median(
                time_help(plan.program / "client.py") for _ in range(REPEATS)
            )
    except (StartError, OSError, subprocess.SubprocessError) as error:
        row.failed = str(error)
    return row


def start_once(contender: Contender, setup: Setup) -> float:
    with (
        tempfile.TemporaryDirectory(prefix="chat-bench-") as name,
        running(contender, setup, Path(name)) as server,
    ):
        return server.started_ms


def time_help(client: Path) -> float:
    """Milliseconds that `client.py --help` takes from start to end."""
    started = time.monotonic()
    command = [sys.executable, str(client), "--help"]
    subprocess.run(command, check=True, capture_output=True, timeout=30, env=environment())
    return (time.monotonic() - started) * 1000


# The whole


def takes_part(scenario: Scenario, contender: Contender) -> bool:
    if contender.servers > 1:
        return scenario.several
    if scenario.several:
        return contender in (OURS, NGIRCD)
    return contender is OURS or not scenario.ours_only


def hold_against(row: Row, rows: list[Row], beside: str) -> None:
    """Say in the row what share it makes of the scenario that it is a variant of."""
    for other in rows:
        if (other.scenario, other.server) == (beside, row.server):
            own, plain = (r.figures.get("deliveries_per_s", 0) for r in (row, other))
            if own and plain:
                row.remarks.append(f"{own / plain:.2f} of the deliveries of {beside}")


def run_scenario(scenario: Scenario, plan: Plan, before: list[Row]) -> list[Row]:
    rows: list[Row] = []
    for contender in plan.contenders:
        if not takes_part(scenario, contender):
            continue
        progress(f"{scenario.name} / {contender.name}")
        if scenario.tls and not find_program("openssl"):
            row = Row(scenario.name, contender.name, failed="left out: no openssl command here")
        elif scenario.kind == "start":
            row = measure_start(contender, plan)
        else:
            row = measure(scenario, contender, plan)
        hold_against(row, before, scenario.beside)
        rows.append(row)
    return rows


def run(plan: Plan) -> None:
    started = time.strftime("%Y-%m-%d %H:%M")
    rows: list[Row] = []
    print(f"{table.machine_line()}\n{plan.seconds:g} s a scenario, scale {plan.scale:g}, {started}")
    print("in brackets: ours divided by theirs")
    for contender in plan.contenders:
        if contender.remark:
            print(f"{contender.name}: {contender.remark}")
    for scenario in plan.scenarios:
        measured = run_scenario(scenario, plan, rows)
        rows += measured
        if measured:
            title = f"\n{scenario.name}: {scenario.about}"
            print(*table.block(title, table.COLUMNS[scenario.kind], measured), sep="\n", flush=True)
    if plan.json:
        write_json(plan, started, rows)


def write_json(plan: Plan, started: str, rows: list[Row]) -> None:
    assert plan.json is not None
    report = {
        "machine": table.machine(),
        "started": started,
        "seconds": plan.seconds,
        "scale": plan.scale,
        "rows": [asdict(row) for row in rows],
    }
    plan.json.write_text(json.dumps(report, indent=2) + "\n")


# The command line


def seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 60:  # the crowd answers no PING; the first would come after 90 s
        raise argparse.ArgumentTypeError("must be from 0.1 to 60")
    return value


def arguments() -> argparse.Namespace:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python tests/bench",
        description=summary,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [scenario.name for scenario in SCENARIOS]
    servers = [contender.name for contender in CONTENDERS]
    add = parser.add_argument
    add("--scenario", action="append", choices=names, help="only this (repeatable)")
    add("--server", action="append", choices=servers, help="only this (repeatable)")
    add("--seconds", type=seconds, default=10, help="of talk in a scenario (default: 10)")
    add("--scale", type=float, default=1, help="multiplies the clients (default: 1)")
    add("--join-deadline", type=float, default=60, metavar="S", help="seconds (default: 60)")
    add("--program", type=Path, default=HERE.parents[1], help="folder of server.py and client.py")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    add("--list", action="store_true", help="list scenarios and servers, and leave")
    return parser.parse_args()


def plan_for(chosen: argparse.Namespace) -> Plan:
    """Take what was asked for; a server that is not here is named and left out."""
    setup = Setup(chosen.program.resolve(), LEAST, LEAST)
    contenders: list[Contender] = []
    for contender in CONTENDERS:
        if contender.name in (chosen.server or [c.name for c in CONTENDERS]):
            if contender.found(setup):
                contenders.append(contender)
            else:
                progress(f"{contender.name} is not here: left out")
    return Plan(
        scenarios=[s for s in SCENARIOS if s.name in (chosen.scenario or [s.name])],
        contenders=contenders,
        seconds=chosen.seconds,
        scale=chosen.scale,
        join_deadline=chosen.join_deadline,
        program=setup.program,
        json=chosen.json,
    )


def list_all(plan: Plan) -> None:
    for scenario in SCENARIOS:
        only = " (ours only)" if scenario.ours_only else ""
        print(f"{scenario.name:14} {scenario.about}{only}")
    print(f"servers here: {', '.join(contender.name for contender in plan.contenders)}")


def on_terminate(number: int, frame: FrameType | None) -> None:
    """Leave through the `finally` clauses, which end the processes started here."""
    sys.exit(128 + number)


def main() -> int:
    chosen = arguments()
    if sys.platform != "linux":
        print("the benchmark reads /proc and uses epoll: it needs Linux", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, on_terminate)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    plan = plan_for(chosen)
    if chosen.list:
        list_all(plan)
        return 0
    try:
        run(plan)
    except KeyboardInterrupt:
        progress("stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
