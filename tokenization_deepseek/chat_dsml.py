"""The chat format of V3.2, whose release brings a Python encoder in place of a template, as a Jinja template.

"v3.2"  V3.2: system messages where they stand, `<｜User｜>...<｜Assistant｜>` and `<think>` or `</think>`; answers
        with calls in DSML (`<｜DSML｜function_calls>`), results in `<function_results>`, then the thinking tag again.

Tools follow the first system message, or stand first. thinking=True is the release's mode "thinking", thinking=False
its mode "chat". Left open, it is "thinking" if an answer behind the last user message has reasoning. Reasoning is
written behind the last user message alone. Unlike the release, which ends any list of messages with the generation
prompt, it follows `add_generation_prompt`, and an answer without reasoning may be rendered in thinking mode (its
thought is empty).

The text about tools is the release's; the model was trained on it.
"""

from .chat_parts import ANSWER, RESPONSE_FORMAT, RESULT_WITHOUT_CALL, TEXT, UNKNOWN_ROLE, dsml_calls, one_line

_V3_2_TOOLS = r"""
{% macro described(tools) %}
  {{ '## Tools\nYou have access to a set of tools you can use to answer the user\'s question.\n' }}
  {{ 'You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your ' }}
  {{ 'reply to the user:\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="$FUNCTION_NAME">\n' }}
  {{ '<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>\n...\n' }}
  {{ '</｜DSML｜invoke>\n<｜DSML｜invoke name="$FUNCTION_NAME2">\n...\n</｜DSML｜invoke>\n' }}
  {{ '</｜DSML｜function_calls>\n' }}
  {{ 'String and scalar parameters should be specified as is without any escaping or quotes, while lists and ' }}
  {{ 'objects should use JSON format. The "string" attribute should be set to "true" for string type parameters ' }}
  {{ 'and "false" for other types (numbers, booleans, arrays, objects).\n' }}
  {{ 'If the thinking_mode is enabled, then after function results you should strongly consider outputting a ' }}
  {{ 'thinking block. Here is an example:\n<｜DSML｜function_calls>\n...\n</｜DSML｜function_calls>\n' }}
  {{ '<function_results>\n...\n</function_results>\n<think>...thinking about results</think>\n' }}
  {{ 'Here are the functions available in JSONSchema format:\n<functions>\n' }}
  {% for tool in tools %}{{ tool['function'] | tojson }}{{ '\n' }}{% endfor %}
  {{ '</functions>\n' }}
{% endmacro %}
"""
_LAST_USER = r"""
{% set ns = namespace(last_user=-1, reasons=false, calls=0, results=0, host=-1) %}
{% for message in messages %}
  {% if message['role'] in ['user', 'developer'] %}
    {% set ns.last_user = loop.index0 %}
    {% set ns.reasons = false %}
  {% elif message['role'] == 'assistant' %}
    {% set opens = text(message['content']).startswith('<think>') %}
    {% set ns.reasons = ns.reasons or opens or message['reasoning_content'] %}
  {% elif message['role'] == 'system' and ns.host < 0 %}
    {% set ns.host = loop.index0 %}
  {% endif %}
{% endfor %}
{% set thinks = thinking if thinking is defined and thinking is not none else ns.reasons %}
"""
_V3_2 = (
    TEXT
    + _V3_2_TOOLS
    + RESPONSE_FORMAT
    + dsml_calls("function_calls", "invoke", "parameter")
    + _LAST_USER
    + r"""
{{ bos_token }}
{% if tools and ns.host < 0 %}{{ extras(tools, none) }}{% endif %}
{% for message in messages %}
  {% set content = text(message['content']) %}
  {% set prompted = not loop.last or add_generation_prompt %}
  {% set tag = '<think>' if thinks and loop.index0 >= ns.last_user else '</think>' %}
  {% set given = message['tools'] or (tools if loop.index0 == ns.host else []) %}
  {% if message['role'] == 'tool' %}
    {% if ns.results >= ns.calls %}"""
    + RESULT_WITHOUT_CALL
    + r"""{% endif %}
    {% if ns.results == 0 %}{{ '\n\n<function_results>' }}{% endif %}
    {{ '\n<result>' + content + '</result>' }}
    {% set ns.results = ns.results + 1 %}
    {% if ns.results == ns.calls %}
      {{ '\n</function_results>' }}
      {% if prompted %}{{ '\n\n' + tag }}{% endif %}
    {% elif loop.last or loop.nextitem['role'] != 'tool' %}
      {{ raise_exception('message ' ~ loop.index ~ ': ' ~ ns.calls ~ ' tool calls have ' ~ ns.results ~ ' results') }}
    {% endif %}
  {% else %}
    {% set ns.calls = (message['tool_calls'] or []) | length %}
    {% set ns.results = 0 %}
  {% endif %}
  {% if message['role'] == 'system' %}{{ content + extras(given, message['response_format']) }}
  {% elif message['role'] == 'developer' %}
    {{ '<｜User｜>' + extras(message['tools'], message['response_format']) }}
    {{ '\n\n# The user\'s message is: ' + content }}
    {% if prompted %}{{ '<｜Assistant｜>' + tag }}{% endif %}
  {% elif message['role'] == 'user' %}
    {{ '<｜User｜>' + content }}
    {% if prompted %}{{ '<｜Assistant｜>' + tag }}{% endif %}
  {% elif message['role'] == 'assistant' %}"""
    + "{% set shows = thinks and loop.index0 > ns.last_user %}"
    + ANSWER
    + r"""{% elif message['role'] != 'tool' %}"""
    + UNKNOWN_ROLE
    + r"""{% endif %}
{% endfor %}
"""
)

DSML_TEMPLATES: dict[str, str] = {"v3.2": one_line(_V3_2)}
