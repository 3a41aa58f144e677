"""Fine-tuning: one training path on Trainer and PEFT (training/run.py) and the tasks that it serves.

A task is a room with a subclass of `training.task.Task`, and one line here.
"""

TASKS = {
    "translation": "finetune_deepseek.translation.task:Translation",
    "classification": "finetune_deepseek.classification.task:Classification",
    "question_answering": "finetune_deepseek.question_answering.task:QuestionAnswering",
    "embedding": "finetune_deepseek.retrieval.task:Embedding",
    "recommendation": "finetune_deepseek.recommendation.task:Recommendation",
    "news_recommendation": "finetune_deepseek.recommendation.news:NewsRecommendation",
    "generative_recommendation": "finetune_deepseek.recommendation.generative:GenerativeRecommendation",
    "prompt_ranking": "finetune_deepseek.recommendation.prompt_ranking:PromptRanking",
}
