"""Chat templates of the families in use, each short enough to be read."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Words trimmed, the header ends with two line breaks
LLAMA_3 = (
    "{{ '<s>' }}{% for message in messages %}"
    "<|start|>{{ message['role'] }}<|header|>\n\n{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|header|>\n\n{% endif %}"
)
# The end of the turn is followed by a line break
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Assistant without a header; a system turn goes into the first question
MISTRAL = (
    "{{ '<s>' }}{% set first = namespace(text='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set first.text = message['content'] + '\n\n' %}"
    "{% elif message['role'] == 'user' %}[INST] {{ first.text + message['content'] }} [/INST]"
    "{% set first.text = '' %}"
    "{% else %} {{ message['content'] | trim }}</s>{% endif %}{% endfor %}"
)
# The assistant has another name
GEMMA = (
    "{{ '<bos>' }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Nothing ends a turn
NO_END = (
    "{% for message in messages %}{{ '\\n\\n' if not loop.first }}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n' }}Assistant: {% endif %}"
)
# The end of a turn is plain text of several tokens
TEXT_END = (
    "{% for message in messages %}### {{ message['role'] }}:\n{{ message['content'] }}\n[end of turn]\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
# The next role marker is the end
GLM = (
    "{{ '[gMASK]' }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Reasoning of earlier turns is left out, that of the last one is written anew, empty if there is none
QWEN_3 = (
    "{% for message in messages %}{% set content = message['content'] %}{% if message['role'] == 'assistant' %}"
    "{% set reasoning = '' %}{% if '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{% set content = '<think>\n' + reasoning + '\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Marks for TRL's `assistant_only_loss`
GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Tools and what they return
TOOLS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Rewrite what is said, letter by letter or from its first letter on
UPPER_CASE = CHATML.replace("message['content']", "message['content'] | upper")
CAPITALIZED = CHATML.replace("message['content']", "message['content'] | capitalize")
# Refuses a conversation without a question
NEEDS_QUESTION = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ raise_exception('No question') }}{% endif %}" + CHATML
)

# The special tokens each of them has
SPECIAL_TOKENS = [
    "<|im_start|>", "<|im_end|>", "<|start|>", "<|header|>", "<|end|>", "<s>", "</s>", "<|user|>", "<|assistant|>",
    "<|system|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "[gMASK]",
]  # fmt: skip
