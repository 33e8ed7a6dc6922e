"""Kill the warehouse's writer with -9 at random moments of ingest, move and publication, and count what is left.

    python benchmarks/kill_nine.py [--kills 50] [--seed 1] [--root DIR]

Prints acknowledged rows, lost and doubled ones, restarts that came up, and how many kills hit each kind of work.
Exit status 1 when anything was lost, doubled, torn or did not come up.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from resources.warehouse import Warehouse

WRITER = Path(__file__).parents[1] / "tests" / "warehouse" / "writer.py"
ROWS_PER_BATCH = 41
# A life ends this many announcements after the start, and then somewhere inside the work that was announced last:
# an append, a move or a publication of this size takes 20 to 150 ms.
MOST_ANNOUNCEMENTS = 20
LONGEST_WORK_SECONDS = 0.15


def one_life(root: Path, name: str, rng: random.Random) -> list[str]:
    """Start a writer, kill it at a random moment after it came up; the lines it said."""
    command = [sys.executable, str(WRITER), "work", str(root), name, str(rng.getrandbits(32))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline().strip() for _ in range(1 + rng.randint(1, MOST_ANNOUNCEMENTS))]
    time.sleep(rng.uniform(0, LONGEST_WORK_SECONDS))
    process.kill()
    rest, complaint = process.communicate()
    if complaint:
        print(complaint[-2000:], file=sys.stderr)
    return said + rest.splitlines()


def stored_rows(root: Path) -> Counter[str]:
    """Rows of each batch that a reader of the restarted warehouse sees."""
    warehouse = Warehouse(root, clock=lambda: datetime(2026, 1, 1, tzinfo=UTC), min_free_bytes=0)
    warehouse.sweep()
    found = warehouse.read(
        "select batch, count(*) as rows, count(distinct part) as parts from ("
        "  select name as batch, labels['row'] as part from raw_kept_samples"
        "  union all select target, 'scrape' from raw_scrapes) group by batch"
    )
    torn = found.filter(found["rows"] != found["parts"])
    if torn.height:
        print(f"rows that appear twice: {torn}", file=sys.stderr)
    return Counter(dict(zip(found["batch"], found["rows"], strict=True)))


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=50)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--root", type=Path)
    given = arguments.parse_args()
    rng = random.Random(given.seed)
    root = given.root or Path(tempfile.mkdtemp(prefix="kill_nine_"))
    root.mkdir(parents=True, exist_ok=True)

    acknowledged: set[str] = set()
    came_up = 0
    hit: Counter[str] = Counter()
    for life in range(given.kills):
        said = one_life(root, f"life{life}", rng)
        came_up += said[0] == "ready"
        acknowledged |= {line.split()[1] for line in said if line.startswith("stored ")}
        hit[
            {"trying": "ingest", "moving": "move", "publishing": "publication"}.get(
                said[-1].partition(" ")[0], "between"
            )
        ] += 1
    rows = stored_rows(root)

    lost = sum(max(0, ROWS_PER_BATCH - rows[batch]) for batch in acknowledged)
    doubled = sum(max(0, count - ROWS_PER_BATCH) for count in rows.values())
    torn = sum(1 for batch, count in rows.items() if batch not in acknowledged and count != ROWS_PER_BATCH)
    print(f"kills {given.kills} ({', '.join(f'{kind} {count}' for kind, count in sorted(hit.items()))})")
    print(f"acknowledged rows {len(acknowledged) * ROWS_PER_BATCH}")
    print(f"lost {lost}")
    print(f"doubled {doubled}")
    print(f"torn batches {torn}")
    print(f"restarts that came up {came_up} of {given.kills}")
    return int(bool(lost or doubled or torn or came_up != given.kills))


if __name__ == "__main__":
    sys.exit(main())
