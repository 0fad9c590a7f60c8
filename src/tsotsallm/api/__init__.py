"""Everything that the command line does, as one call each: a file for every verb.

What has many options takes them as one frozen object (`options=`, `sampling=`) or as keywords; the package root offers the
calls as `tsotsallm.<verb>`.
"""
