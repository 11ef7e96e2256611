"""The trainer: one fresh process for each job. Must stay free of imports."""
