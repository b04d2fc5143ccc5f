"""What was signed while the database was away, in files of this machine: how a record is written and read
back, and the directory that one process has for them.
"""
