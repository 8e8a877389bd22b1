"""The paper's Section 4, one file a subsection, from one command:

    python -m experiments table5 --data DIR

    comparison.py    Tables 3 and 4 (data, models), recall by popularity, the main job
    ablation.py      Table 5, Figure 3, and what the paper leaves open, a change at a time
    controls.py      is it content that the student learns, or would any teacher do; and
                     which lists teach
    prompt.py        does the prompt pay, and where
    transfer.py      settings from elsewhere: does distillation do harm
    methods.py       CKD, PRM-KD and KDSR beside PromptMM; what they claim is in
                     claims.py, questions.py, inside.py and forgetting.py
    cost.py          Table 6: time, memory, size
    sensitivity.py   Figure 4: one setting at a time
    convergence.py   Figure 5: epoch by epoch
    incremental.py   Table 7: a fifth of the interactions arrives later
    printed.py       Tables 6, 8, 9 and Figure 2 as the paper prints them, re-derived
    errata.py        the errata, each shown by a few lines that run
    tune.py          the search behind every preset
    bench.py         what is claimed to be fast, beside the usual way

Read lab.py first (train once, judge, compare), then any table: each is one function that
takes a `Lab` and returns an `Output`. publish.py writes that down; __main__.py has the list
of parts and the command. Nothing outside this package reads results/, and the core imports
nothing from here.
"""
