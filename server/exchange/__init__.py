"""Messages to the members and checked replies from them: who is a member, what is asked, what is taken."""
