"""Temporary door to the accounts protocol while core is being finished."""
from corral.core.api import *  # noqa: F403
from corral.core.api import Accounts, NewUser, Tickets, UserPatch, UserQuery, UserView  # noqa: F401
