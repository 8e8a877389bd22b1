"""Other ways to distil into the same student.

A method is a file and a line in METHODS. It is a factory(run, student, teachers) -> what
`common.Distiller` says: what it adds to the student's own loss, what is trained beside the
student and dropped at inference, and the lists it asks for. Teachers are frozen embeddings,
so any model can teach. A function will do; a class may also have

    Settings        a frozen subclass of promptmm.Config; own fields are `of="method"`
    SPACE           what the search may try, a value's name -> values
    needs(config)   which trained models teach, of "joint" (PromptMM's teacher and its
                    modalities; the default), "alone" (a teacher for each modality, by the
                    modality's name) and "lightgcn"

`common.train` trains any of them; tests/test_registry.py holds each to the same contract.
docs/methods.md compares them.
"""

from distillers import correlation, counterfactual, frozen, several_teachers

METHODS = {
    "PromptMM, prompt frozen": frozen.promptmm,
    "CKD": counterfactual.CKD,
    "PRM-KD (ours after 002)": several_teachers.PRMKD,
    "KDSR": correlation.KDSR,
}
