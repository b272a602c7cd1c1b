"""Chat templates (Jinja) of the hosts with a Q-Former: parts of type image and video become placeholders."""

# Macros of both templates: the pictures of a message in order, then its text.
_PARTS = """
{%- macro visuals(message, before, after) -%}
  {%- if message['content'] is not string -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] in ('image', 'video') %}{{ before + '<' + part['type'] + '>' + after }}{% endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro words(message) -%}
  {%- if message['content'] is string %}{{ message['content'] }}{% else -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
      {{ part['text'] }}{% if not loop.last %}{{ ' ' }}{% endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""

# InstructBLIP has no turns: what is seen comes first, then the words. An answer follows its question as the next word
# does, for that is where it is asked for, and ends with the end-of-sequence token, as in its own tuning.
INSTRUCTBLIP_CHAT_TEMPLATE = (
    _PARTS
    + """
{%- for message in messages %}{{ visuals(message, '', '') }}{% endfor -%}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{ ' ' }}{% generation %}{{ words(message) + eos_token }}{% endgeneration -%}
  {%- else %}{% if not loop.first %}{{ '\n' }}{% endif %}{{ words(message) }}{% endif -%}
{%- endfor -%}
"""
)

# As in MiniGPT-4's demo. "<Img>" is plain text.
MINIGPT4_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
MINIGPT4_STOP = "###"
MINIGPT4_CHAT_TEMPLATE = (
    _PARTS
    + f"""
{{%- if messages[0]['role'] != 'system' %}}{{{{ '{MINIGPT4_SYSTEM}{MINIGPT4_STOP}' }}}}{{% endif -%}}"""
    + """
{%- for message in messages -%}
  {%- if message['role'] == 'system' %}{{ words(message) + '###' }}
  {%- elif message['role'] == 'assistant' -%}
    {{ 'Assistant: ' }}{% generation %}{{ words(message) + '###' }}{% endgeneration -%}
  {%- else %}{{ 'Human: ' + visuals(message, '<Img>', '</Img> ') + words(message) + '###' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif -%}
"""
)
