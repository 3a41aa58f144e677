"""What several processes share is left at the end of a command."""

from torch import distributed

from finetune_deepseek.__main__ import guarded


def test_the_end_of_a_command_leaves_the_group_of_processes(tmp_path, capsys):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    assert guarded([], "presets") == 0 and not distributed.is_initialized()
    assert guarded([], "presets") == 0 and "tiny_v3" in capsys.readouterr().out
