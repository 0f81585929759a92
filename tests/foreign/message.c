/* Messages in bytes, in msgpack-c's objects and in json-c's. See client.c. */
#include "message.h"

#include <stdlib.h>
#include <string.h>

/* ---- bytes: where a message ends, and whether it may be there at all ---- */

static uint64_t big_endian(const uint8_t *at, unsigned width) {
    uint64_t value = 0;
    while (width--) value = value << 8 | *at++;
    return value;
}

/* Reads headers only, so that nothing is allocated for a length somebody merely claims. */
static verdict scan(const uint8_t *data, size_t size, size_t *end) {
    static const uint8_t numbers[] = {4, 8, 1, 2, 4, 8, 1, 2, 4, 8}; /* 0xca to 0xd3 */
    uint64_t left[MAX_DEPTH + 1] = {1}, values = 0, at = 0;
    unsigned depth = 0;
    while (true) {
        if (at > size) return PARTIAL;
        while (left[depth] == 0) {
            if (depth-- == 0) return *end = at, WHOLE;
        }
        if (at >= size) return PARTIAL;
        uint8_t first = data[at];
        unsigned width = 0; /* of the length behind the first byte */
        uint64_t body = 0;
        bool array = first >> 4 == 9 || first == 0xdc || first == 0xdd;
        bool map = first >> 4 == 8 || first == 0xde || first == 0xdf;
        if (first == 0xc1 || (first >= 0xc7 && first <= 0xc9) || (first >= 0xd4 && first <= 0xd8)) return BROKEN;
        if (first >= 0xc4 && first <= 0xc6) width = 1u << (first - 0xc4);
        if (first >= 0xd9 && first <= 0xdb) width = 1u << (first - 0xd9);
        if (first >= 0xdc) width = first >= 0xe0 ? 0 : first % 2 ? 4 : 2;
        if (size - at < 1 + width) return PARTIAL;
        uint64_t length = width ? big_endian(data + at + 1, width) : first & 15u;
        if (first >= 0xca && first <= 0xd3) body = numbers[first - 0xca];
        else if (first >> 5 == 5) body = first & 31u;
        else if (!array && !map && width) body = length;
        left[depth]--;
        at += 1 + width + body;
        if (array || map) {
            if (depth == MAX_DEPTH) return BROKEN;
            left[++depth] = map ? 2 * length : length;
            values += left[depth];
        }
        if (at + left[depth] > MAX_FRAME || values > MAX_VALUES) return BROKEN;
    }
}

static bool utf8(const uint8_t *at, size_t size) {
    for (const uint8_t *end = at + size; at < end;) {
        unsigned more = *at < 0x80 ? 0 : *at >> 5 == 6 ? 1 : *at >> 4 == 14 ? 2 : *at >> 3 == 30 ? 3 : 9;
        if (more == 9 || (size_t)(end - at) <= more) return false;
        uint32_t point = more ? *at & (0x3fu >> more) : *at;
        for (unsigned i = 1; i <= more; i++) {
            if (at[i] >> 6 != 2) return false;
            point = point << 6 | (at[i] & 0x3f);
        }
        static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
        if (point < least[more] || point > 0x10ffff || point >> 11 == 0x1b) return false;
        at += more + 1;
    }
    return true;
}

/* ---- values ---- */

static bool is_text(const msgpack_object *value) {
    return value->type == MSGPACK_OBJECT_STR && utf8((const uint8_t *)value->via.str.ptr, value->via.str.size);
}

static bool same_text(const msgpack_object *value, const char *text, size_t size) {
    return value->type == MSGPACK_OBJECT_STR && value->via.str.size == size && !memcmp(value->via.str.ptr, text, size);
}

static bool well_formed(const msgpack_object *value) {
    if (value->type == MSGPACK_OBJECT_STR) return is_text(value);
    if (value->type == MSGPACK_OBJECT_ARRAY) {
        for (uint32_t i = 0; i < value->via.array.size; i++)
            if (!well_formed(&value->via.array.ptr[i])) return false;
    }
    if (value->type != MSGPACK_OBJECT_MAP) return true;
    for (uint32_t i = 0; i < value->via.map.size; i++) {
        const msgpack_object_kv *pair = &value->via.map.ptr[i];
        if (!is_text(&pair->key) || !well_formed(&pair->val)) return false;
        for (uint32_t j = 0; j < i; j++) {
            const msgpack_object *other = &value->via.map.ptr[j].key;
            if (same_text(other, pair->key.via.str.ptr, pair->key.via.str.size)) return false;
        }
    }
    return true;
}

const msgpack_object *get(const msgpack_object *map, const char *key) {
    for (uint32_t i = 0; map && map->type == MSGPACK_OBJECT_MAP && i < map->via.map.size; i++)
        if (same_text(&map->via.map.ptr[i].key, key, strlen(key))) return &map->via.map.ptr[i].val;
    return NULL;
}

uint64_t number(const msgpack_object *map, const char *key) {
    const msgpack_object *value = get(map, key);
    if (!value || value->type != MSGPACK_OBJECT_POSITIVE_INTEGER) die("no integer '%s' in the answer", key);
    return value->via.u64;
}

bool says(const msgpack_object *map, const char *key, const char *text) {
    const msgpack_object *value = get(map, key);
    return value && same_text(value, text, strlen(text));
}

/* The three forms of a message, by the table under Framing. */
static bool is_message(const msgpack_object *value) {
    if (value->type != MSGPACK_OBJECT_ARRAY || value->via.array.size < 3 || !well_formed(value)) return false;
    const msgpack_object *part = value->via.array.ptr;
    if (part[0].type != MSGPACK_OBJECT_POSITIVE_INTEGER || part[0].via.u64 > 2) return false;
    uint64_t type = part[0].via.u64;
    if (value->via.array.size != (type == 2 ? 3 : 4)) return false;
    if (type < 2 && (part[1].type != MSGPACK_OBJECT_POSITIVE_INTEGER || part[1].via.u64 > UINT32_MAX)) return false;
    if (type == 1)
        return part[2].type == MSGPACK_OBJECT_NIL ||
               (part[2].type == MSGPACK_OBJECT_MAP && part[3].type == MSGPACK_OBJECT_NIL);
    const msgpack_object *method = &part[2 - type / 2], *params = method + 1;
    return method->type == MSGPACK_OBJECT_STR && params->type == MSGPACK_OBJECT_ARRAY && params->via.array.size == 1 &&
           params->via.array.ptr[0].type == MSGPACK_OBJECT_MAP;
}

verdict decode(msgpack_zone *zone, const uint8_t *data, size_t size, size_t *end, msgpack_object *out) {
    verdict found = scan(data, size, end);
    if (found != WHOLE) return found;
    size_t offset = 0;
    if (msgpack_unpack((const char *)data, *end, &offset, zone, out) < 0 || offset != *end) return BROKEN;
    return is_message(out) ? WHOLE : BROKEN;
}

/* ---- JSON: what the vectors and our own requests are written in ---- */

struct json_object *member(struct json_object *map, const char *key) {
    struct json_object *found = NULL;
    json_object_object_get_ex(map, key, &found);
    return found;
}

uint8_t *unhex(const char *hex, size_t *size) {
    *size = strlen(hex) / 2;
    uint8_t *bytes = malloc(*size + 1);
    for (size_t i = 0; bytes && i < *size; i++)
        if (sscanf(hex + 2 * i, "%2hhx", &bytes[i]) != 1) die("'%s' is no hex", hex);
    if (!bytes) die("out of memory");
    return bytes;
}

/* {"$bin": hex} or NULL. */
static struct json_object *bin_of(struct json_object *json) {
    bool map = json_object_is_type(json, json_type_object) && json_object_object_length(json) == 1;
    return map ? member(json, "$bin") : NULL;
}

void pack(msgpack_packer *packer, struct json_object *json) {
    size_t size;
    struct json_object *bin = bin_of(json);
    if (bin) {
        uint8_t *bytes = unhex(json_object_get_string(bin), &size);
        msgpack_pack_bin_with_body(packer, bytes, size);
        free(bytes);
        return;
    }
    switch (json_object_get_type(json)) {
    case json_type_null: msgpack_pack_nil(packer); break;
    case json_type_boolean: json_object_get_boolean(json) ? msgpack_pack_true(packer) : msgpack_pack_false(packer); break;
    case json_type_double: msgpack_pack_double(packer, json_object_get_double(json)); break;
    case json_type_int: /* uint64 turns what is negative into 0 */
        if (json_object_get_int64(json) < 0) msgpack_pack_int64(packer, json_object_get_int64(json));
        else msgpack_pack_uint64(packer, json_object_get_uint64(json));
        break;
    case json_type_string:
        size = (size_t)json_object_get_string_len(json);
        msgpack_pack_str_with_body(packer, json_object_get_string(json), size);
        break;
    case json_type_array:
        msgpack_pack_array(packer, json_object_array_length(json));
        for (size_t i = 0; i < json_object_array_length(json); i++) pack(packer, json_object_array_get_idx(json, i));
        break;
    case json_type_object:
        msgpack_pack_map(packer, (size_t)json_object_object_length(json));
        json_object_object_foreach(json, key, value) {
            msgpack_pack_str_with_body(packer, key, strlen(key));
            pack(packer, value);
        }
    }
}

bool equals(const msgpack_object *value, struct json_object *json) {
    struct json_object *bin = bin_of(json);
    if (bin) {
        size_t size;
        uint8_t *bytes = unhex(json_object_get_string(bin), &size);
        bool same = value->type == MSGPACK_OBJECT_BIN && value->via.bin.size == size &&
                    (size == 0 || !memcmp(value->via.bin.ptr, bytes, size));
        free(bytes);
        return same;
    }
    switch (json_object_get_type(json)) {
    case json_type_null: return value->type == MSGPACK_OBJECT_NIL;
    case json_type_boolean:
        return value->type == MSGPACK_OBJECT_BOOLEAN && value->via.boolean == json_object_get_boolean(json);
    case json_type_double:
        return (value->type == MSGPACK_OBJECT_FLOAT64 || value->type == MSGPACK_OBJECT_FLOAT32) &&
               value->via.f64 == json_object_get_double(json);
    case json_type_int:
        if (json_object_get_int64(json) < 0)
            return value->type == MSGPACK_OBJECT_NEGATIVE_INTEGER && value->via.i64 == json_object_get_int64(json);
        return value->type == MSGPACK_OBJECT_POSITIVE_INTEGER && value->via.u64 == json_object_get_uint64(json);
    case json_type_string:
        return same_text(value, json_object_get_string(json), (size_t)json_object_get_string_len(json));
    case json_type_array:
        if (value->type != MSGPACK_OBJECT_ARRAY || value->via.array.size != json_object_array_length(json)) return false;
        for (uint32_t i = 0; i < value->via.array.size; i++)
            if (!equals(&value->via.array.ptr[i], json_object_array_get_idx(json, i))) return false;
        return true;
    case json_type_object:
        if (value->type != MSGPACK_OBJECT_MAP) return false;
        if (value->via.map.size != (uint32_t)json_object_object_length(json)) return false;
        json_object_object_foreach(json, key, item) {
            const msgpack_object *found = get(value, key);
            if (!found || !equals(found, item)) return false;
        }
        return true;
    }
    return false;
}
