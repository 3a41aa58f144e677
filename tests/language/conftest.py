from tests.small_runs import data, finetune, one_thread  # noqa: F401  # fixtures
