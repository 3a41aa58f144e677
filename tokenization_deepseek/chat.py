"""Chat formats of the generations, as Jinja templates for `tokenizer.chat_template`.

"v2"    V2:        BOS, system and an empty line, `User: ...` and an empty line, `Assistant: ...` EOS.
"v3"    V3, R1:    BOS, system, `<｜User｜>...<｜Assistant｜>...` EOS, nothing between; also named "r1".
"v3.1"  V3.1:      as V3, and an answer opens with `</think>` right after `<｜Assistant｜>`. The generation prompt ends
                   with `</think>`, or with `<think>` when rendered with thinking=True.

Reasoning is cut from answers, up to the last `</think>` (V3, R1) or up to the first (V3.1), but not from an answer to
tool outputs. Several system messages are joined by an empty line. Answers and their EOS stand in `{% generation %}`,
so `apply_chat_template(..., return_assistant_tokens_mask=True)` marks what a model should learn to write.
R1's format puts tool arguments into a json fence, V3.1's follows the name with bare arguments. Unlike the released R1
template, a second round of tool calls is written like the first one (there it loses its opening).
"""


def _one_line(template: str) -> str:
    """Drop line breaks and indentation: they are for the reader, and each engine treats them differently."""
    return "".join(line.strip() for line in template.splitlines())


_OPENING = r"""
{% set ns = namespace(after='') %}
{{ bos_token }}
{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') }}
"""
_ARGUMENTS = """
{% set arguments = call['function']['arguments'] %}
{% if arguments is not string %}{% set arguments = arguments | tojson %}{% endif %}
"""
_UNKNOWN_ROLE = "{{ raise_exception('this chat format has no role ' + message['role']) }}"

_V2 = (
    r"""
{{ bos_token }}
{% for message in messages %}
  {% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}
  {% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}
  {% elif message['role'] == 'assistant' %}
    {{ 'Assistant:' }}
    {% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
  {% else %}"""
    + _UNKNOWN_ROLE
    + """{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""
)

_V3 = (
    _OPENING
    + r"""
{% for message in messages %}
  {% set content = message['content'] | default('', true) %}
  {% if message['role'] == 'user' %}{{ '<｜User｜>' + content }}
  {% elif message['role'] == 'assistant' %}
    {% if ns.after != 'tool' %}{{ '<｜Assistant｜>' }}{% endif %}
    {% generation %}
    {% if message['tool_calls'] %}
      {{ content + '<｜tool▁calls▁begin｜>' }}
      {% for call in message['tool_calls'] %}"""
    + _ARGUMENTS
    + r"""
        {{ '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] }}
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

_V3_1 = (
    _OPENING
    + r"""
{% for message in messages %}
  {% set content = message['content'] | default('', true) %}
  {% if message['role'] == 'user' %}{{ '<｜User｜>' + content }}
  {% elif message['role'] == 'assistant' %}
    {% if ns.after == 'user' %}{{ '<｜Assistant｜></think>' }}{% endif %}
    {% generation %}
    {% if message['tool_calls'] %}
      {{ content + '<｜tool▁calls▁begin｜>' }}
      {% for call in message['tool_calls'] %}"""
    + _ARGUMENTS
    + r"""
        {{ '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' + arguments + '<｜tool▁call▁end｜>' }}
      {% endfor %}
      {{ '<｜tool▁calls▁end｜>' }}
    {% elif ns.after == 'tool' %}{{ content }}
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
    "v2": _one_line(_V2),
    "v3": _one_line(_V3),
    "r1": _one_line(_V3),
    "v3.1": _one_line(_V3_1),
}
