from tests.small_runs import one_thread  # noqa: F401  # a fixture
