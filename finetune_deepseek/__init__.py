"""Fine-tuning: one training path on Trainer and PEFT (run.py) and the tasks that it serves.

A task is one file with a subclass of `run.Task`, and one line here.
"""

TASKS = {
    "translation": "finetune_deepseek.translation.task:Translation",
    "classification": "finetune_deepseek.classification.task:Classification",
    "question_answering": "finetune_deepseek.question_answering.task:QuestionAnswering",
    "embedding": "finetune_deepseek.retrieval.task:Embedding",
    "recommendation": "finetune_deepseek.recommendation:Recommendation",
    "news_recommendation": "finetune_deepseek.news_recommendation:NewsRecommendation",
    "generative_recommendation": "finetune_deepseek.semantic_ids:GenerativeRecommendation",
    "prompt_ranking": "finetune_deepseek.prompt_ranking:PromptRanking",
}
