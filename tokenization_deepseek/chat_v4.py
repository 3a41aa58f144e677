"""Chat formats of V4 and V4.1, whose releases bring a Python encoder in place of a template, as Jinja templates.

"v4"        V4 preview and Pro: `<｜User｜>...<｜Assistant｜>` and `<think>` or `</think>`; calls in DSML, results of
            tools as parts of the user's turn (`<tool_result>`), in the order of the calls (by id), parts apart by an
            empty line. `reasoning_effort`: "high" or none writes nothing, "max" a text behind BOS.
"v4-0731"   the release of 2026-07-31: "low" or none writes nothing, "high" what "max" is above, "max" another text.
"v4.1"      V4.1: `<｜System｜>` before system messages (a later one counts as a user's turn) and before the effort, a
            number from 1 to 100 or low, high, max for 50, 75, 100 (xhigh is 75 too); "high" if none. Names of tags in
            DSML begin with a blank. With `with_images` an image among the parts of a content is
            `<｜deepseek_image｜>`.

The same word of effort is another prompt in each; it is written in thinking mode alone. `thinking` is as in V3.2.
Reasoning of earlier turns and developer messages before the last user's are dropped in thinking mode, unless there are
tools (those on a user's message don't count) or `drop_thinking` is false. Further roles: developer, latest_reminder.
Further fields of messages: `tools` and `response_format` (system, developer), `task` (action, query, authority,
domain, title, read_url: what is asked for in place of an answer), `wo_eos` (the answer goes on).
"""

from .chat_parts import (
    ANSWER,
    IMAGE_PART,
    RESPONSE_FORMAT,
    RESULT_WITHOUT_CALL,
    TEXT,
    TEXT_PART,
    UNKNOWN_ROLE,
    dsml_calls,
    one_line,
    refuse,
)

_TOOLS = r"""
{% macro described(tools) %}
  {{ '## Tools\n\nYou have access to a set of tools to help answer the user\'s question. You can invoke tools by ' }}
  {{ 'writing a "<｜DSML｜BLOCK>" block like the following:\n\n' }}
  {{ '<｜DSML｜BLOCK>\n<｜DSML｜INVOKE name="$TOOL_NAME">\n' }}
  {{ '<｜DSML｜PARAMETER name="$NAME_OF_ONE" string="true|false">$VALUE_OF_ONE</｜DSML｜PARAMETER>\n...\n' }}
  {{ '</｜DSML｜INVOKE>\n<｜DSML｜INVOKE name="$TOOL_NAME2">\n...\n</｜DSML｜INVOKE>\n</｜DSML｜BLOCK>\n\n' }}
  {{ 'String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, ' }}
  {{ 'arrays, objects), pass the value in JSON format and set `string="false"`.\n\n' }}
  {{ 'If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside ' }}
  {{ '<think>...</think> BEFORE any tool calls or final response.\n\n' }}
  {{ 'Otherwise, output directly after </think> with tool calls or final response.\n\n' }}
  {{ '### Available Tool Schemas\n\n' }}
  {% for tool in tools %}{{ tool['function'] | tojson }}{{ '\n' }}{% endfor %}
  {{ '\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n' }}
{% endmacro %}
"""
_ABSOLUTE = (
    r"Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    r"You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    r"rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    r"Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    r"alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_BEYOND = (
    r"Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    r"You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose "
    r"the problem into its most fundamental components, trace every causal chain to its root, and resolve the "
    r"underlying cause rather than any surface symptom.\n"
    r"Do not stop reasoning until you have independently verified the solution from multiple angles and are certain "
    r"that no assumption remains unchecked and no error remains undiscovered.\n\n"
)
_WRONG_EFFORT = refuse("'reasoning_effort ' ~ reasoning_effort ~ '; it knows KNOWN'")


def _efforts(usual: str, **texts: str) -> str:
    """Sets `effort` to the text for `reasoning_effort`, `usual` if none was given."""
    table = ", ".join(f"'{word}': '{text}'" for word, text in texts.items())
    return f"""
{{% set efforts = {{ {table} }} %}}
{{% set reasoning_effort = reasoning_effort or '{usual}' %}}
{{% if reasoning_effort not in efforts %}}{_WRONG_EFFORT.replace("KNOWN", ", ".join(texts))}{{% endif %}}
{{% set effort = efforts[reasoning_effort] %}}
"""


_NUMBERED = (
    r"""
{% set numbers = {'low': 50, 'high': 75, 'xhigh': 75, 'max': 100} %}
{% if not reasoning_effort is number %}{% set reasoning_effort = reasoning_effort or 'high' %}{% endif %}
{% set number = numbers[reasoning_effort] if reasoning_effort in numbers else reasoning_effort %}
{% if number is not integer or number is boolean or number < 1 or number > 100 %}"""
    + _WRONG_EFFORT.replace("KNOWN", "1 to 100, low, high, xhigh, max")
    + r"""{% endif %}
{% set scale = ' (range 1-100, the higher the value, the more thorough the reasoning)\n\n' %}
{% set effort = 'Reasoning Effort: ' ~ number ~ scale %}
"""
)
_V4 = (
    TEXT
    + r"""
{% set joint = '\n\n' %}
{% set ns = namespace(last_user=-1, reasons=false, tooled=tools, host=-1, kept=[]) %}
{% for message in messages %}
  {% if message['role'] in ['user', 'developer'] %}{% set ns.reasons = false %}
  {% elif message['role'] == 'assistant' %}
    {% set opens = text(message['content']).startswith('<think>') %}
    {% set ns.reasons = ns.reasons or opens or message['reasoning_content'] %}
  {% endif %}
  {% if message['role'] in ['user', 'tool', 'developer'] TURNS %}{% set ns.last_user = loop.index0 %}{% endif %}
  {% if message['role'] == 'system' %}{% set ns.host = 0 %}{% endif %}
  {% if message['role'] in ['system', 'developer'] and message['tools'] %}{% set ns.tooled = true %}{% endif %}
{% endfor %}
{% set thinks = thinking if thinking is defined and thinking is not none else ns.reasons %}
{% set drops = not ns.tooled and (drop_thinking is not defined or drop_thinking) %}
{% if tools and ns.host < 0 %}{% set ns.kept = [{'role': 'system', 'content': ''}] %}{% endif %}
{% for message in messages %}
  {% if not (thinks and drops and message['role'] == 'developer' and loop.index0 < ns.last_user) %}
    {% set ns.kept = ns.kept + [message] %}
  {% endif %}
{% endfor %}
{% set ns.host = -1 %}
{% for message in ns.kept %}
  {% if message['role'] in ['user', 'tool', 'developer'] TURNS %}{% set ns.last_user = loop.index0 %}{% endif %}
  {% if message['role'] == 'system' and ns.host < 0 %}{% set ns.host = loop.index0 %}{% endif %}
{% endfor %}
"""
)
# A user's turn is a run of user and tool messages; a task ends it for the next user message. Results of tools take the
# places of one another in the order of the calls.
_RESULTS = r"""
{% set ns.results = [] %}
{% set ns.shown = 0 %}
{% set ns.goes_on = true %}
{% for other in ns.kept[here:] %}
  {% set is_next = not loop.first and other['role'] == 'user' and ns.task %}
  {% if other['role'] not in ['user', 'tool'] or is_next %}{% set ns.goes_on = false %}{% endif %}
  {% if ns.goes_on and other['role'] == 'tool' %}
    {% set place = ns.ids.index(other['tool_call_id']) if other['tool_call_id'] in ns.ids else 0 %}
    {% set ns.results = ns.results + [{'place': place, 'text': text(other['content'])}] %}
  {% endif %}
{% endfor %}
{% set ns.results = ns.results | sort(attribute='place') %}
"""
_PROMPT = r"""
{% set answered = not loop.last and loop.nextitem['role'] in ['assistant', 'latest_reminder'] %}
{% set followed = answered or (loop.last and add_generation_prompt) %}
{% set tag = '<think>' if thinks and (not drops or here >= ns.last_user) else '</think>' %}
{% if followed and ns.task %}
  {% if ns.task not in ['action', 'query', 'authority', 'domain', 'title', 'read_url'] %}"""
_PROMPT += refuse("'a task ' ~ ns.task")
_PROMPT += r"""{% endif %}
  {% if ns.task == 'action' %}{{ '<｜Assistant｜>' + ('<think>' if thinks else '</think>') }}{% endif %}
  {{ '<｜' + ns.task + '｜>' }}
{% elif followed and (message['role'] in ['user', 'tool', 'developer'] TURNS) %}
  {{ '<｜Assistant｜>' + tag }}
{% endif %}
"""
_MESSAGES = (
    r"""
{{ bos_token }}
{% set ns.ids = [] %}
{% set ns.waits = false %}
{% set ns.in_turn = false %}
{% set ns.task = none %}
{% for message in ns.kept %}
  {% set here = loop.index0 %}
  {% set role = message['role'] %}
  {% set content = text(message['content']) %}
  {% set is_turn = role in ['user', 'tool'] %}
  {% set joins = is_turn and ns.in_turn and not (role == 'user' and ns.task) %}
  {% set ns.in_turn = is_turn %}
  {% set task_before = ns.task %}
  {% if not joins %}{% set ns.task = message['task'] if role != 'tool' else none %}{% endif %}
  {% if loop.first %}OPENING{% endif %}
  {% set extra = extras(message['tools'] or (tools if here == ns.host else []), message['response_format']) %}
  {% if role == 'system' %}SYSTEM{{ content + extra }}
  {% elif role == 'developer' %}
    {% if not content %}{{ raise_exception('message ' ~ loop.index ~ ', of a developer, is empty') }}{% endif %}
    {{ '<｜User｜>' + content + extra }}
  {% elif role == 'latest_reminder' %}{{ '<｜latest_reminder｜>' + content }}
  {% elif is_turn %}
    {% if joins %}{{ '\n\n' }}{% else %}{{ '<｜User｜>' }}"""
    + _RESULTS
    + r"""{% endif %}
    {% if role == 'user' %}{{ content }}
    {% else %}
      {% if not ns.waits %}"""
    + RESULT_WITHOUT_CALL
    + r"""{% endif %}
      {{ '<tool_result>' + ns.results[ns.shown]['text'] + '</tool_result>' }}
      {% set ns.shown = ns.shown + 1 %}
    {% endif %}
  {% elif role == 'assistant' %}
    {% set shows = thinks and not task_before and (not drops or here > ns.last_user) %}"""
    + ANSWER
    + r"""
    {% set ns.waits = message['tool_calls'] %}
    {% if message['tool_calls'] %}{% set ns.ids = [] %}{% endif %}
    {% for call in message['tool_calls'] or [] %}
      {% set ns.ids = ns.ids + [call['id'] or call['function']['id']] %}
    {% endfor %}
  {% else %}"""
    + UNKNOWN_ROLE
    + r"""{% endif %}
  {% set next_role = loop.nextitem['role'] if not loop.last else '' %}
  {% if not (is_turn and next_role in ['user', 'tool'] and not (next_role == 'user' and ns.task)) %}"""
    + _PROMPT
    + r"""{% endif %}
{% endfor %}
"""
)


def _template(
    effort: str, tags: tuple[str, str, str], turns: str = "", opening: str = "", system: str = "", part: str = ""
) -> str:
    """tags: names of the block, of a call and of a parameter. turns: what else counts as a user's turn. part: what
    else a content may have."""
    block, invoke, parameter = tags
    described = _TOOLS.replace("BLOCK", block).replace("INVOKE", invoke).replace("PARAMETER", parameter)
    described = described.replace("$NAME_OF_ONE", "$PARAMETER_NAME").replace("$VALUE_OF_ONE", "$PARAMETER_VALUE")
    form = (
        effort + _V4.replace(TEXT_PART, TEXT_PART + part) + described + RESPONSE_FORMAT + dsml_calls(*tags) + _MESSAGES
    )
    opening += "{% if thinks %}{{ effort }}{% endif %}"
    return one_line(form.replace("TURNS", turns).replace("OPENING", opening).replace("SYSTEM", system))


_TAGS = ("tool_calls", "invoke", "parameter")
_TOKEN = "{{ '<｜System｜>' }}"
V4_TEMPLATES: dict[str, str] = {
    "v4": _template(_efforts("high", high="", max=_ABSOLUTE), _TAGS),
    "v4-0731": _template(_efforts("low", low="", high=_ABSOLUTE, max=_BEYOND), _TAGS),
    "v4.1": _template(
        _NUMBERED,
        (" calls", " invoke", " parameter"),
        turns="or (message['role'] == 'system' and loop.index0 > 0)",
        opening="{% if thinks or role == 'system' %}" + _TOKEN + "{% endif %}",
        system="{% if here > 0 %}" + _TOKEN + "{% endif %}",
        part=IMAGE_PART,
    ),
}
