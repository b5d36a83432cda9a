"""The report: rows of figures as a table for people, and the machine they come from."""

import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

OVERLOAD = 0.9
"""Share of its core above which the load, not the server, may have been the limit."""

DISTURBED = 0.02
"""Share of the time that others had of the machine above which figures are said to suffer."""

KEPT_UP = 0.97
"""Share of the deliveries due below which a server is said to have failed to deliver."""


@dataclass(slots=True)
class Row:
    """What one server did in one scenario: figures, or why there are none."""

    scenario: str
    server: str
    figures: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of the table; `ratio` is whether ours is compared with the others'."""

    heading: str
    key: str
    form: Callable[[float], str]
    ratio: bool = True


def number(value: float) -> str:
    """Write a number with three digits that matter."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return number(value / (1e3 if letter == " k" else size)) + letter
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{decimals}f}"


def percent(value: float) -> str:
    return f"{value * 100:.0f} %"


def kilobytes(value: float) -> str:
    return number(value / 1000)


TALK = (
    Column("deliveries/s", "deliveries_per_s", number),
    Column("p50 ms", "p50_ms", number),
    Column("p99 ms", "p99_ms", number),
    Column("max ms", "max_ms", number),
    Column("CPU µs/delivery", "cpu_us_per_delivery", number),
    Column("core", "server_core", percent, ratio=False),
    Column("KB/client", "memory_per_client", kilobytes),
    Column("all in s", "join_s", number),
)

JOIN = (
    Column("all in s", "join_s", number),
    Column("all told s", "quiet_s", number),
    Column("one p50 ms", "one_p50_ms", number),
    Column("one max ms", "one_max_ms", number),
    Column("CPU s", "join_server_cpu_s", number),
    Column("KB/client", "memory_per_client", kilobytes),
)

START = (
    Column("listens ms", "listens_ms", number),
    Column("client --help ms", "client_help_ms", number),
)

COLUMNS = {"talk": TALK, "join": JOIN, "start": START}


def remarks_on(figures: dict[str, float]) -> list[str]:
    """Say what a reader of the figures has to know beside them."""
    said: list[str] = []
    reached, behind = figures.get("reached", 1.0), figures.get("behind_s", 0.0)
    if behind and reached < KEPT_UP:
        said.append(f"cannot keep up: {percent(reached)} delivered {number(behind)} s late")
    elif behind:
        said.append(f"cannot keep up: the last line came {number(behind)} s late")
    if missed := figures.get("missed"):
        said.append(f"{missed * 100:.1f} % of the lines reported as missed")
    if lost := figures.get("lost"):
        said.append(f"{lost:.0f} of {figures['clients']:.0f} clients dropped")
    if (torn := figures.get("torn", 0)) > 0.0005:
        said.append(f"{torn * 100:.1f} % of lines torn")
    if (error := figures.get("count_error", 0)) > 0.01:
        said.append(f"the two counts differ by {error * 100:.1f} %")
    if figures.get("load_core", 0) > OVERLOAD:
        said.append(f"! the load was the limit: {percent(figures['load_core'])} of its core")
    if (stolen := figures.get("stolen", 0)) > DISTURBED:
        said.append(f"! the host took {percent(stolen)} of the time away")
    return said


# The table


def cell(row: Row, ours: Row | None, column: Column) -> str:
    """Write a figure, and beside another server's, ours divided by it."""
    value = row.figures.get(column.key)
    if value is None:
        return "-"
    text = column.form(value)
    if not column.ratio or ours is None or ours is row:
        return text
    own = ours.figures.get(column.key)
    return f"{text} ({number(own / value)}x)" if own and value > 0 else text


def block(title: str, columns: tuple[Column, ...], rows: list[Row]) -> Iterable[str]:
    """Write one scenario: a row a server, the numbers aligned to the right."""
    ours = next((row for row in rows if row.server == "ours" and not row.failed), None)
    lines = [["", *(column.heading for column in columns), ""]]
    for row in rows:
        cells = [cell(row, ours, column) for column in columns]
        if row.failed:
            cells = ["-"] * len(columns)
        notes = "; ".join([*([row.failed] if row.failed else []), *row.remarks])
        lines.append([row.server, *cells, notes])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    yield title
    for line in lines:
        padded = [line[0].ljust(widths[0])]
        padded += [line[i].rjust(widths[i]) for i in range(1, len(columns) + 1)]
        yield f"  {'  '.join([*padded, line[-1]])}".rstrip()


def machine() -> dict[str, str | int]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def machine_line() -> str:
    here = machine()
    return f"{here['cpu']}, {here['cores']} cores, {here['system']}, Python {here['python']}"
