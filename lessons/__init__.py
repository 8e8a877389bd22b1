"""Eight questions with runnable answers; README.md has the table and a plan for a class."""
