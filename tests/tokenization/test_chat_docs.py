"""The code of docs/chat.md runs and prints what it says, in both languages."""

import re
from pathlib import Path

import pytest

from tokenization_deepseek import CHAT_TEMPLATES, DeepSeekTokenizer

DOCS = Path(__file__).parents[2] / "docs"
PRINTED = """\
Easy.</think>4<｜end▁of▁sentence｜>
<｜Assistant｜><think>
{'role': 'assistant', 'reasoning_content': 'Easy.', 'content': '4'}
reasoning_content Ea
reasoning_content sy.
content 4
"""


@pytest.mark.parametrize("page", ["chat.md", "chat.zh-CN.md"])
def test_the_pages_code(trained, page, monkeypatch, capsys):
    monkeypatch.setattr(DeepSeekTokenizer, "from_pretrained", lambda name: trained)
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL))
    place: dict = {}
    exec(code, place)
    assert capsys.readouterr().out == PRINTED
    assert place["message"] == {"role": "assistant", "reasoning_content": "Easy.", "content": "4"}
    comments = re.findall(r"(?:  |^)# (.*)$", code, re.MULTILINE)
    assert set(PRINTED.splitlines()[:3]) <= set(comments)


@pytest.mark.parametrize("page", ["chat.md", "chat.zh-CN.md"])
def test_the_pages_table_has_every_template(page):
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / page).read_text("utf-8"), re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`(.*?)`", row)] == list(CHAT_TEMPLATES)
