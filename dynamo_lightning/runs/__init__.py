"""Run folders: who may write into one, what it holds, and how a stopped run goes on in it."""
