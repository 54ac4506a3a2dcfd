"""Studies: many short training runs that differ in a few options, run to an end that was fixed beforehand."""
