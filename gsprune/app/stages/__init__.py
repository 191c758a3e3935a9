"""The stages of a job, functions and small objects with typed inputs and outputs. `gsprune.app.job` lists them.

What a stage has left on disk is read, not computed again. Every process of a job runs every stage; the first one alone
writes files, tracks and prints.
"""
