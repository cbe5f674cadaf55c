#ifndef FACTS_H
#define FACTS_H

#include <stdio.h>

struct config;

void facts_print(const struct config *config, FILE *to);

#endif
