"""What fails stays in its room: every contributed callable is called through here at run time."""
