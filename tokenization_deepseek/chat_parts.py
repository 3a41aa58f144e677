"""What chat templates share: texts of contents, refusals, tool calls in DeepSeek's markup (DSML).

Pieces are Jinja that a reader can follow; `one_line` makes the template of them.
"""


def one_line(template: str) -> str:
    """Drop line breaks and indentation: they are for the reader, and each engine treats them differently."""
    return "".join(line.strip() for line in template.splitlines())


def refuse(what: str) -> str:
    """`what` is a Jinja expression."""
    return "{{ raise_exception('this chat format has no place for ' ~ " + what + ") }}"


# What may follow a text part among the parts of a content: of generations that see, where somebody sees to the pixels.
TEXT_PART = r"""
      {% elif part['type'] == 'text' %}{{ part['text'] }}
"""
IMAGE = "<｜deepseek_image｜>"
IMAGE_PART = f"""
      {{% elif part['type'] in ['image', 'image_url'] and with_images %}}{{{{ '{IMAGE}' }}}}
"""
# Contents are texts, lists of text parts, or absent. `thinking` is undefined where nobody asked for it.
TEXT = (
    r"""
{% set joint = '' %}
{% macro text(content) %}
  {% if content is string %}{{ content }}
  {% elif content is mapping or (content is defined and content is not none and content is not iterable) %}"""
    + refuse("'a content that is neither a text nor a list of parts'")
    + r"""{% else %}
    {% for part in content or [] %}
      {% if part is string %}{{ part }}"""
    + TEXT_PART
    + r"""{% else %}"""
    + refuse("'a part of type ' ~ part['type']")
    + r"""{% endif %}
      {% if not loop.last %}{{ joint }}{% endif %}
    {% endfor %}
  {% endif %}
{% endmacro %}
{% if documents %}"""
    + refuse("'documents'")
    + r"""{% endif %}
{% if thinking is not defined %}{% set thinking = enable_thinking %}{% endif %}
"""
)
UNKNOWN_ROLE = "{{ raise_exception('this chat format has no role ' ~ message['role']) }}"
RESULT_WITHOUT_CALL = "{{ raise_exception('message ' ~ loop.index ~ ' is a tool result, but no call waits for one') }}"


def dsml_calls(block: str, invoke: str, parameter: str) -> str:
    """A macro `tool_calls(calls)`; the three are names of tags. Arguments are dictionaries."""
    return (
        r"""
{% macro tool_calls(calls) %}
  {{ '\n\n<｜DSML｜BLOCK>\n' }}
  {% for call in calls %}
    {% set arguments = call['function']['arguments'] or {} %}
    {% if arguments is string %}
      {{ raise_exception('the arguments of ' ~ call['function']['name'] ~ ' are given as text; parse its JSON') }}
    {% endif %}
    {{ '<｜DSML｜INVOKE name="' + call['function']['name'] + '">\n' }}
    {% for name, value in arguments.items() %}
      {{ '<｜DSML｜PARAMETER name="' + name + '" string="' + ('true' if value is string else 'false') + '">' }}
      {{ value if value is string else value | tojson }}{{ '</｜DSML｜PARAMETER>' }}
      {% if not loop.last %}{{ '\n' }}{% endif %}
    {% endfor %}
    {{ '\n</｜DSML｜INVOKE>\n' }}
  {% endfor %}
  {{ '</｜DSML｜BLOCK>' }}
{% endmacro %}
"""
    ).replace("BLOCK", block).replace("INVOKE", invoke).replace("PARAMETER", parameter)  # fmt: skip


# A system or developer message may bring tools and the schema of the answer. `described(tools)` is the format's own.
RESPONSE_FORMAT = r"""
{% macro extras(given, response_format) %}
  {% if given %}{{ '\n\n' + described(given) }}{% endif %}
  {% if response_format %}
    {{ '\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n' }}
    {{ response_format | tojson }}
  {% endif %}
{% endmacro %}
"""

# In thinking mode (`shows`) an answer's own `<think>` at its very beginning is the one that stands there already.
ANSWER = r"""
{% generation %}
{% if shows and content.startswith('<think>') and not message['reasoning_content'] %}
  {{ content.removeprefix('<think>') }}
{% else %}
  {% if shows %}{{ text(message['reasoning_content']) + '</think>' }}{% endif %}
  {{ content }}
{% endif %}
{% if message['tool_calls'] %}{{ tool_calls(message['tool_calls']) }}{% endif %}
{% if not message['wo_eos'] %}{{ eos_token }}{% endif %}
{% endgeneration %}
"""
