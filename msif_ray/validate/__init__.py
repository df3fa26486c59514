"""Whether the scores mean something: experiments that a user can rerun (`jobs/validate.py`, docs/validation.md)."""
