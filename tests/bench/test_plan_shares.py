"""The table of a CSV of bench/plans.cu."""

from bench import plan_shares

COLUMNS = "outer,channels,inner,dtype,direction,epilogue,schedule,ahead,planned,us,wrong,copy_us"
ROWS = """
128,256,784,bfloat16,forward,none,two_phase,0,0,50,0,25
128,256,784,bfloat16,forward,none,stream,0,0,40,0,25
128,256,784,bfloat16,forward,none,stream,2,1,31.25,0,25
128,256,784,bfloat16,forward,none,stream,1,0,10,3,25
128,256,784,bfloat16,forward,none,stream,1,0,nan,hang,nan
128,256,784,bfloat16,forward,relu,stream,3,0,25,0,25
128,256,784,bfloat16,backward,none,two_phase,0,1,75,0,25
"""


def test_shares_are_those_of_the_fastest_right_plan(tmp_path):
    path = tmp_path / "plans.csv"
    path.write_text(f"# NVIDIA H200\n{COLUMNS}{ROWS}")
    head, forward, backward = plan_shares.lines(plan_shares.rows_of(path))
    assert head.split()[-1] == "planned"
    assert forward.split() == "128x256x784 bfloat16 forward 25.0 0.50 0.80 0.62 - 0.80 - 0.80".split()
    assert backward.split() == "128x256x784 bfloat16 backward 25.0 0.50 - - - - - 0.50".split()
