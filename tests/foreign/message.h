/* What a message is: see the sections Encoding, Framing and Bounds of protocol/SPEC.md. */
#include <json-c/json.h>
#include <msgpack.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_FRAME = 1048576, MAX_DEPTH = 32, MAX_VALUES = 262144 };

typedef enum { BROKEN = -1, PARTIAL = 0, WHOLE = 1 } verdict;

#define die(...) (fflush(stdout), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(1))

/* One message off the front of data, if it is whole and one: *end is where it ends; its memory is the zone's. */
verdict decode(msgpack_zone *zone, const uint8_t *data, size_t size, size_t *end, msgpack_object *out);

/* The value of a key or NULL, also of what is no map; an integer that must be there; whether it is this text. */
const msgpack_object *get(const msgpack_object *map, const char *key);
uint64_t number(const msgpack_object *map, const char *key);
bool says(const msgpack_object *map, const char *key, const char *text);

/* JSON as the vectors have it, where {"$bin": hex} is bytes. */
struct json_object *member(struct json_object *map, const char *key);
void pack(msgpack_packer *packer, struct json_object *json);
bool equals(const msgpack_object *value, struct json_object *json);

/* Bytes to be freed, and how many they are. */
uint8_t *unhex(const char *hex, size_t *size);
