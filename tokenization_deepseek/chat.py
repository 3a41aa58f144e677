"""Chat formats of the generations, as Jinja templates for `tokenizer.chat_template`.

"coder" Coder:     BOS, system, then `### Instruction:`, `### Response:` and EOS, each on lines of its own. Its release
                   opens chats without a system message by a text about itself, which is left out here.
"v2"    LLM, V2:   BOS, system and an empty line, `User: ...` and an empty line, `Assistant: ...` EOS.
"v2.5"  V2.5:      BOS, system, `<｜User｜>...<｜Assistant｜>...` EOS, nothing between; no reasoning.
"v3"    V3, R1:    the same; also named "r1". R1 as updated in February 2025, whose generation prompt opens the thought
                   by `<think>` and a line feed, is named "r1-think".
"v3.1"  V3.1:      as V3, and an answer opens with `</think>` right after `<｜Assistant｜>`. The generation prompt ends
                   with `</think>`, or with `<think>` when rendered with thinking=True (or enable_thinking=True); so
                   does the opening of an answer with `prefix` then. Tools follow the system message.

Reasoning is cut from answers, up to the last `</think>` (V3, R1) or up to the first (V3.1), but not from an answer to
tool outputs. `reasoning_content` is written before an answer behind the last user message and left out of earlier
ones, as in use; thinking=False leaves it out of all. An answer that opens with `<think>` and doesn't close it
(a prefilled one) is left open.
System messages stand where they are (Coder, V2) or first, joined by an empty line. Contents are texts or lists of text
parts. Answers and their EOS stand in `{% generation %}`, so `apply_chat_template(...,
return_assistant_tokens_mask=True)` marks what a model should learn to write. What a format has no place for (tools,
tool calls, documents, reasoning, other parts than texts, roles, results without calls) is refused in one line.
Tool arguments stand in a json fence (V2.5 to R1) or bare behind the name (V3.1). Unlike the released templates, a
second round of tool calls is written like the first one (there it loses its opening), V2.5's single call has its end,
and its system messages are all there, not only the last. "v3.2" is in chat_dsml.py, V4's in chat_v4.py.
"""

import re

from .chat_dsml import DSML_TEMPLATES
from .chat_parts import RESULT_WITHOUT_CALL, TEXT, UNKNOWN_ROLE, one_line, refuse
from .chat_v4 import V4_TEMPLATES

_OPENING = (
    TEXT
    + r"""
{% set ns = namespace(system='', apart='', after='', last_user=-1, calls=0) %}
{% for message in messages %}
  {% if message['role'] == 'user' %}{% set ns.last_user = loop.index0 %}
  {% elif message['role'] == 'system' %}
    {% set ns.system = ns.system + ns.apart + text(message['content']) %}
    {% set ns.apart = '\n\n' %}
  {% endif %}
{% endfor %}
{{ bos_token }}
"""
)
_NO_TOOLS = "{% if tools %}" + refuse("'tools; describe them in the system message'") + "{% endif %}"
_NO_SWITCH = "{% if thinking %}" + refuse("'thinking=True'") + "{% endif %}"
_NO_CALLS = "{% if message['tool_calls'] %}" + refuse("'tool calls'") + "{% endif %}"
_REASONING = """
{% set reasoning = '' %}
{% if loop.index0 > ns.last_user and thinking != false %}
  {% set reasoning = text(message['reasoning_content']) %}
{% endif %}
"""
_NO_REASONING = "{% if reasoning %}" + refuse("'reasoning_content; thinking=False leaves it out'") + "{% endif %}"
_NO_REASONING_AFTER_TOOLS = (
    "{% if reasoning and ns.after == 'tool' %}"
    + refuse("'reasoning_content in an answer to tool outputs; thinking=False leaves it out'")
    + "{% endif %}"
)
_ARGUMENTS = """
{% set arguments = call['function']['arguments'] %}
{% if arguments is not string %}{% set arguments = arguments | tojson %}{% endif %}
"""
_WAITED_FOR = "{% if not ns.calls %}" + RESULT_WITHOUT_CALL + "{% endif %}"
_REMEMBER = """
{% if message['role'] != 'system' %}{% set ns.after = message['role'] %}{% endif %}
{% if message['role'] not in ['system', 'tool'] %}
  {% set ns.calls = (message['tool_calls'] or []) | length %}
{% endif %}
"""

_CODER = (
    _OPENING
    + _NO_TOOLS
    + _NO_SWITCH
    + r"""
{% for message in messages %}
  {% if message['role'] == 'system' %}{{ text(message['content']) }}
  {% elif message['role'] == 'user' %}{{ '### Instruction:\n' + text(message['content']) + '\n' }}
  {% elif message['role'] == 'assistant' %}"""
    + _NO_CALLS
    + _REASONING
    + _NO_REASONING
    + r"""
    {{ '### Response:\n' }}
    {% generation %}{{ text(message['content']) + '\n' + eos_token }}{% endgeneration %}
    {{ '\n' }}
  {% else %}"""
    + UNKNOWN_ROLE
    + r"""{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}
"""
)

_V2 = (
    _OPENING
    + _NO_TOOLS
    + _NO_SWITCH
    + r"""
{% for message in messages %}
  {% if message['role'] == 'system' %}{{ text(message['content']) + '\n\n' }}
  {% elif message['role'] == 'user' %}{{ 'User: ' + text(message['content']) + '\n\n' }}
  {% elif message['role'] == 'assistant' %}"""
    + _NO_CALLS
    + _REASONING
    + _NO_REASONING
    + r"""
    {{ 'Assistant:' }}
    {% generation %}{{ ' ' + text(message['content']) + eos_token }}{% endgeneration %}
  {% else %}"""
    + UNKNOWN_ROLE
    + """{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""
)


_V3 = (
    _OPENING
    + _NO_TOOLS
    + "SWITCH"
    + r"""
{{ ns.system }}
{% for message in messages %}
  {% set content = text(message['content']) %}
  {% if message['role'] == 'user' %}{{ '<｜User｜>' + content }}
  {% elif message['role'] == 'assistant' %}"""
    + _REASONING
    + _NO_REASONING_AFTER_TOOLS
    + r"""
    {% if ns.after != 'tool' %}{{ '<｜Assistant｜>' }}FORCED{% endif %}
    {% generation %}
    {% if reasoning %}{{ 'OPENING' + reasoning + '\n</think>\n\n' }}{% endif %}
    {% if message['tool_calls'] %}
      {{ content + '<｜tool▁calls▁begin｜>' }}
      {% for call in message['tool_calls'] %}"""
    + _ARGUMENTS
    + r"""
        {{ '<｜tool▁call▁begin｜>' + (call['type'] or 'function') + '<｜tool▁sep｜>' + call['function']['name'] }}
        {{ '\n```json\n' + arguments + '\n```<｜tool▁call▁end｜>' }}
        {% if not loop.last %}{{ '\n' }}{% endif %}
      {% endfor %}
      {{ '<｜tool▁calls▁end｜>' }}
    {% elif ns.after == 'tool' %}{{ content }}
    {% else %}{{ content CUT }}{% endif %}
    {{ eos_token }}
    {% endgeneration %}
  {% elif message['role'] == 'tool' %}"""
    + _WAITED_FOR
    + r"""
    {% if ns.after != 'tool' %}{{ '<｜tool▁outputs▁begin｜>' }}JOINT{% endif %}
    {{ '<｜tool▁output▁begin｜>' + content + '<｜tool▁output▁end｜>' }}
    {% if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}
  {% elif message['role'] != 'system' %}"""
    + UNKNOWN_ROLE
    + """{% endif %}"""
    + _REMEMBER
    + """
{% endfor %}
{% if add_generation_prompt and ns.after != 'tool' %}{{ '<｜Assistant｜>' }}PROMPT{% endif %}
"""
)


def _v3(**pieces: str) -> str:
    """V3's form with some pieces as another release has them."""
    usual = {"SWITCH": _NO_SWITCH, "FORCED": "", "OPENING": r"<think>\n", "CUT": ".split('</think>')[-1]", "JOINT": ""}
    template = _V3
    for name, piece in {**usual, "PROMPT": "", **pieces}.items():
        template = template.replace(name, piece)
    return template


_THINK = r"{{ '<think>\n' }}"
_FORCED = {
    "SWITCH": "",
    "FORCED": "{% if reasoning %}" + _THINK + "{% endif %}",
    "OPENING": "",
    "PROMPT": "{% if thinking != false %}" + _THINK + "{% endif %}",
}
_V2_5 = _v3(CUT="", JOINT=r"{% else %}{{ '\n' }}").replace(_NO_REASONING_AFTER_TOOLS, _NO_REASONING)

# The text about tools is the one of the model card of V3.1, section "ToolCall"; models were trained on it.
_V3_1_TOOLS = r"""
{% if tools %}
  {{ '\n\n## Tools\nYou have access to the following tools:\n\n' }}
  {% for tool in tools %}
    {{ '### ' + tool['function']['name'] + '\nDescription: ' + (tool['function']['description'] or '') + '\n\n' }}
    {{ 'Parameters: ' + (tool['function']['parameters'] or {}) | tojson + '\n\n' }}
  {% endfor %}
  {{ 'IMPORTANT: ALWAYS adhere to this exact format for tool use:\n' }}
  {{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>' }}
  {{ '{additional_tool_calls}<｜tool▁calls▁end｜>\n\nWhere:\n' }}
  {{ '- `tool_call_name` must be an exact match to one of the available tools\n' }}
  {{ "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n" }}
  {{ '- For multiple tool calls, chain them directly without separators or spaces' }}
{% endif %}
"""

_V3_1 = (
    _OPENING
    + "{{ ns.system }}"
    + _V3_1_TOOLS
    + r"""
{% for message in messages %}
  {% set content = text(message['content']) %}
  {% if message['role'] == 'user' %}{{ '<｜User｜>' + content }}
  {% elif message['role'] == 'assistant' %}"""
    + _REASONING
    + _NO_REASONING_AFTER_TOOLS
    + r"""
    {% set prefilled = message['prefix'] and thinking and not reasoning %}
    {% set open = content.startswith('<think>') and not reasoning and (prefilled or '</think>' not in content) %}
    {% if ns.after == 'user' %}
      {{ '<｜Assistant｜>' }}
      {% if not open %}{{ '<think>' if reasoning or prefilled else '</think>' }}{% endif %}
    {% endif %}
    {% generation %}
    {% if reasoning %}{{ reasoning + '</think>' }}{% endif %}
    {% if message['tool_calls'] %}
      {{ content + '<｜tool▁calls▁begin｜>' }}
      {% for call in message['tool_calls'] %}"""
    + _ARGUMENTS
    + r"""
        {{ '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' + arguments + '<｜tool▁call▁end｜>' }}
      {% endfor %}
      {{ '<｜tool▁calls▁end｜>' }}
    {% elif ns.after == 'tool' or prefilled %}{{ content }}
    {% else %}{{ content.split('</think>', 1)[-1] }}{% endif %}
    {{ eos_token }}
    {% endgeneration %}
  {% elif message['role'] == 'tool' %}"""
    + _WAITED_FOR
    + """{{ '<｜tool▁output▁begin｜>' + content + '<｜tool▁output▁end｜>' }}
  {% elif message['role'] != 'system' %}"""
    + UNKNOWN_ROLE
    + """{% endif %}"""
    + _REMEMBER
    + """
{% endfor %}
{% if add_generation_prompt and ns.after == 'user' %}
  {{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}
{% endif %}
"""
)

# The last of these that stands between hyphens in a checkpoint's name tells its template.
_OF_CHECKPOINTS = {
    "LLM": "v2",
    "MOE": "v2",
    "MATH": "v2",
    "CODER": "coder",
    "V2": "v2",
    "V2.5": "v2.5",
    "V3": "v3",
    "R1": "r1-think",
    "V3.1": "v3.1",
    "V3.2": "v3.2",
    "V3.2-EXP": "v3.1",
    "V4": "v4",
    "V4.1": "v4.1",
    "0731": "v4-0731",
    "0813": "v4-0731",
}


def template_name(checkpoint: str) -> str:
    """The name in `CHAT_TEMPLATES` of the chat format of a published checkpoint, by its Hub id or folder.

    Raises ValueError for a name that tells no generation, and for variants whose format isn't known.
    """
    name = checkpoint.rstrip("/").rpartition("/")[2].upper()
    known = [template for sign, template in _OF_CHECKPOINTS.items() if f"-{sign}-" in f"-{name}-"]
    if not known or re.search("DSPARK|VISION|BASE|DISTILL", name):
        raise ValueError(f"{checkpoint}: no chat format is known for this name; there are {', '.join(CHAT_TEMPLATES)}")
    return known[-1]


CHAT_TEMPLATES: dict[str, str] = {
    "coder": one_line(_CODER),
    "v2": one_line(_V2),
    "v2.5": one_line(_V2_5),
    "v3": one_line(_v3()),
    "r1": one_line(_v3()),
    "r1-think": one_line(_v3(**_FORCED)),
    "v3.1": one_line(_V3_1),
    **DSML_TEMPLATES,
    **V4_TEMPLATES,
}
