"""Chat formats of the generations, as Jinja templates for `tokenizer.chat_template`.

"coder" Coder:     BOS, system, then `### Instruction:`, `### Response:` and EOS, each on lines of its own. Its release
                   opens chats without a system message by a text about itself, which is left out here.
"v2"    LLM, V2:   BOS, system and an empty line, `User: ...` and an empty line, `Assistant: ...` EOS.
"v3"    V3, R1:    BOS, system, `<｜User｜>...<｜Assistant｜>...` EOS, nothing between; also named "r1".
"v3.1"  V3.1:      as V3, and an answer opens with `</think>` right after `<｜Assistant｜>`. The generation prompt ends
                   with `</think>`, or with `<think>` when rendered with thinking=True (or enable_thinking=True); so
                   does the opening of an answer with `prefix` then. Tools follow the system message.

Reasoning is cut from answers, up to the last `</think>` (V3, R1) or up to the first (V3.1), but not from an answer to
tool outputs. `reasoning_content` is written before an answer behind the last user message and left out of earlier
ones, as in use; thinking=False leaves it out of all. An answer that opens with `<think>` and doesn't close it
(a prefilled one) is left open.
Several system messages are joined by an empty line. Contents are texts or lists of text parts. Answers and their EOS
stand in `{% generation %}`, so `apply_chat_template(..., return_assistant_tokens_mask=True)` marks what a model should
learn to write. What a format has no place for (tools, tool calls, documents, reasoning, other parts than texts, roles)
is refused in one line.
R1's format puts tool arguments into a json fence, V3.1's follows the name with bare arguments. Unlike the released R1
template, a second round of tool calls is written like the first one (there it loses its opening).
"""


def _one_line(template: str) -> str:
    """Drop line breaks and indentation: they are for the reader, and each engine treats them differently."""
    return "".join(line.strip() for line in template.splitlines())


def _refuse(what: str) -> str:
    """`what` is a Jinja expression."""
    return "{{ raise_exception('this chat format has no place for ' ~ " + what + ") }}"


_OPENING = (
    r"""
{% macro text(content) %}
  {% if content is string %}{{ content }}
  {% else %}
    {% for part in content or [] %}
      {% if part is string %}{{ part }}
      {% elif part['type'] == 'text' %}{{ part['text'] }}
      {% else %}"""
    + _refuse("'a part of type ' ~ part['type']")
    + r"""{% endif %}
    {% endfor %}
  {% endif %}
{% endmacro %}
{% if documents %}"""
    + _refuse("'documents'")
    + r"""{% endif %}
{% if thinking is not defined %}{% set thinking = enable_thinking %}{% endif %}
{% set ns = namespace(system='', apart='', after='', last_user=-1) %}
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
_NO_TOOLS = "{% if tools %}" + _refuse("'tools; describe them in the system message'") + "{% endif %}"
_NO_SWITCH = "{% if thinking %}" + _refuse("'thinking=True'") + "{% endif %}"
_NO_CALLS = "{% if message['tool_calls'] %}" + _refuse("'tool calls'") + "{% endif %}"
_UNKNOWN_ROLE = "{{ raise_exception('this chat format has no role ' ~ message['role']) }}"
_REASONING = """
{% set reasoning = '' %}
{% if loop.index0 > ns.last_user and thinking != false %}
  {% set reasoning = text(message['reasoning_content']) %}
{% endif %}
"""
_NO_REASONING = "{% if reasoning %}" + _refuse("'reasoning_content; thinking=False leaves it out'") + "{% endif %}"
_NO_REASONING_AFTER_TOOLS = (
    "{% if reasoning and ns.after == 'tool' %}"
    + _refuse("'reasoning_content in an answer to tool outputs; thinking=False leaves it out'")
    + "{% endif %}"
)
_ARGUMENTS = """
{% set arguments = call['function']['arguments'] %}
{% if arguments is not string %}{% set arguments = arguments | tojson %}{% endif %}
"""

_CODER = (
    _OPENING
    + _NO_TOOLS
    + _NO_SWITCH
    + r"""
{{ ns.system }}
{% for message in messages %}
  {% if message['role'] == 'user' %}{{ '### Instruction:\n' + text(message['content']) + '\n' }}
  {% elif message['role'] == 'assistant' %}"""
    + _NO_CALLS
    + _REASONING
    + _NO_REASONING
    + r"""
    {{ '### Response:' }}
    {% generation %}{{ '\n' + text(message['content']) + '\n' + eos_token }}{% endgeneration %}
    {{ '\n' }}
  {% elif message['role'] != 'system' %}"""
    + _UNKNOWN_ROLE
    + """{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '### Response:' }}{% endif %}
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
    + _UNKNOWN_ROLE
    + """{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""
)

_V3 = (
    _OPENING
    + _NO_TOOLS
    + _NO_SWITCH
    + r"""
{{ ns.system }}
{% for message in messages %}
  {% set content = text(message['content']) %}
  {% if message['role'] == 'user' %}{{ '<｜User｜>' + content }}
  {% elif message['role'] == 'assistant' %}"""
    + _REASONING
    + _NO_REASONING_AFTER_TOOLS
    + r"""
    {% if ns.after != 'tool' %}{{ '<｜Assistant｜>' }}{% endif %}
    {% generation %}
    {% if reasoning %}{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}
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
    {% else %}{{ content.split('</think>')[-1] }}{% endif %}
    {{ eos_token }}
    {% endgeneration %}
  {% elif message['role'] == 'tool' %}
    {% if ns.after != 'tool' %}{{ '<｜tool▁outputs▁begin｜>' }}{% endif %}
    {{ '<｜tool▁output▁begin｜>' + content + '<｜tool▁output▁end｜>' }}
    {% if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}
  {% elif message['role'] != 'system' %}"""
    + _UNKNOWN_ROLE
    + """{% endif %}
  {% if message['role'] != 'system' %}{% set ns.after = message['role'] %}{% endif %}
{% endfor %}
{% if add_generation_prompt and ns.after != 'tool' %}{{ '<｜Assistant｜>' }}{% endif %}
"""
)

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
  {% elif message['role'] == 'tool' %}{{ '<｜tool▁output▁begin｜>' + content + '<｜tool▁output▁end｜>' }}
  {% elif message['role'] != 'system' %}"""
    + _UNKNOWN_ROLE
    + """{% endif %}
  {% if message['role'] != 'system' %}{% set ns.after = message['role'] %}{% endif %}
{% endfor %}
{% if add_generation_prompt and ns.after == 'user' %}
  {{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}
{% endif %}
"""
)

CHAT_TEMPLATES: dict[str, str] = {
    "coder": _one_line(_CODER),
    "v2": _one_line(_V2),
    "v3": _one_line(_V3),
    "r1": _one_line(_V3),
    "v3.1": _one_line(_V3_1),
}
