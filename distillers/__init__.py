"""Other ways to distil into the same student.

A method is a file and a line in METHODS. It is a factory(run, student, teachers) ->
Distiller: what it adds to the student's own loss, what is trained beside the student and
dropped at inference, and the lists it asks for. Teachers are frozen embeddings, so any
model can teach. `common.train` trains any of them; tests/test_registry.py holds each to the
same contract.
"""

from distillers import frozen

METHODS = {"PromptMM, prompt frozen": frozen.promptmm}
