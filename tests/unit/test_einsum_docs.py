"""docs/from_einsum.md is true: its Python runs, block after block."""

import re

from tests.arch import rules


def test_page_runs():
    page = rules.ROOT / "docs" / "from_einsum.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    space: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name} block {number + 1}", "exec"), space)
