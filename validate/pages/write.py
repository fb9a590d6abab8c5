"""Pages whose tables are made from stored tables: between ``<!-- table: NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

from traces.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "validate/reasoner/results/README.md",
    "validate/reasoner/weights/README.md",
    "validate/pretrained/README.md",
)
_BLOCK = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def page_table(name: str) -> str:
    """Return one of the pages' tables as Markdown.

    Raises
    ------
    UserError
        If there is no such table.
    """
    from validate.pretrained.page_tables import TABLES as OF_PRETRAINED
    from validate.reasoner.page_tables import TABLES as OF_REASONER

    tables = OF_REASONER | OF_PRETRAINED
    if name not in tables:
        raise UserError(f"page table is '{name}'; allowed: {', '.join(tables)}")
    return tables[name]()


def made(page: str) -> str:
    """Return the text of a page with every table as the stored tables give it now.

    Raises
    ------
    UserError
        If it names an unknown table.
    """
    return _BLOCK.sub(lambda block: f"{block[1]}{page_table(block[2])}\n{block[3]}", page)


def pages(check: bool = False) -> None:
    """Write the tables of the pages anew from the stored tables.

    With ``check``, write nothing: name the pages that would change, and exit with 1 if there are any.

    Raises
    ------
    UserError
        If a page is missing, as it is outside a checkout, or names an unknown table.
    """
    from traces.atomic import write_file

    changed = []
    for name in PAGES:
        path = ROOT / name
        if not path.is_file():
            raise UserError(f"{name} is missing; allowed: in a checkout of the repository")
        old = path.read_text(encoding="utf-8")
        new = made(old)
        if new == old:
            continue
        changed.append(name)
        if not check:
            write_file(path, partial(Path.write_text, data=new, encoding="utf-8"))
    told = "differs from the stored tables" if check else "written"
    for name in changed:
        print(f"sim: {name}: {told}", file=sys.stderr)
    if check and changed:
        sys.exit(1)
