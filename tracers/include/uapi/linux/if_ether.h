/* Empty on purpose; see linux/types.h. */
