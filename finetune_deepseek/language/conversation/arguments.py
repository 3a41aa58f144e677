"""What fine-tuning on conversations is told: which rows, in which template, what is trained of them."""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...data.arguments import DataArguments


@dataclass
class ConversationArguments(DataArguments):
    """Which conversations, how they become text, and which tokens of it are trained."""

    FIRST = (*DataArguments.FIRST, "chat_template", "train_on", "packing")
    SAVED: ClassVar[tuple[str, ...]] = ("train_on", "train_prompt_tokens", "thinking", "max_seq_length")
    EXAMPLES = """examples:
  deepseek-hf finetune conversation --data_dir data/chats --preset tiny_v3 --output_dir runs/chat
      a small model from scratch on your conversations; its tokenizer is trained on them
  deepseek-hf finetune conversation --data_dir data/chats --model_name_or_path deepseek-ai/DeepSeek-V2-Lite \\
      --chat_template v2 --use_peft --lora_target attention shared --output_dir runs/chat-lora
      LoRA on a pretrained model, loss on the assistant's turns
  deepseek-hf predict conversation runs/chat-lora --test_file problems.jsonl --max_replies 500 \\
      --answer_pattern "#### (.*)"
      replies beside references, and how many end in the same answer"""

    layout: Literal["auto", "messages", "prompt_completion", "sharegpt", "alpaca"] = field(
        default="auto",
        metadata={
            "help": "How rows hold conversations: messages (role, content), prompt and completion, ShareGPT "
            "(conversations with from, value), Alpaca (instruction, input, output); auto tells by the columns."
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "A word of CHAT_TEMPLATES (v2, v3, v3.1, ...) or a file with a Jinja template that marks answers "
            "by {%% generation %%}; without it the tokenizer's own."
        },
    )
    train_on: Literal["assistant", "all", "last"] = field(
        default="assistant",
        metadata={"help": "The loss is on all of the assistant's turns, on all turns, or on the last answer alone."},
    )
    train_prompt_tokens: bool = field(
        default=False,
        metadata={
            "help": "Train what the generation prompt supplies, too: the header of an answer, a forced <think> or "
            "</think>."
        },
    )
    thinking: Literal["template", "keep", "last", "drop"] = field(
        default="template",
        metadata={
            "help": "Reasoning: template writes it where the template does, which cuts it from earlier turns; keep "
            "writes it in every turn; last is template with the loss on that of the last answer only; drop leaves it "
            "out."
        },
    )
    max_seq_length: int = field(
        default=2048,
        metadata={"help": "Tokens of a conversation, or of a packed row. Longer ones lose their oldest turns."},
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Put several conversations into a row of --max_seq_length, each seeing itself alone."},
    )
    max_replies: int = field(
        default=20, metadata={"help": "Conversations of the test split whose last turn is generated; 0 for none."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens of a reply, at most."})
    answer_pattern: str | None = field(
        default=None,
        metadata={
            "help": 'A regular expression with one group: what it last finds in a reply is its answer, as "#### (.*)" '
            "does; answers are compared as numbers where both are."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names_data:
            raise ValueError("Name data by --dataset_name, --data_dir, or --train_file and the like.")
        if self.answer_pattern is None:
            return
        where = f"--answer_pattern {self.answer_pattern!r}"
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"{where}: no regular expression: {error}.") from error
        if groups != 1:
            raise ValueError(f"{where}: it has {groups} groups; put one pair of parentheses around the answer.")
