/* A client in C, on msgpack-c and json-c, that knows of this project what protocol/SPEC.md says.
 *
 *   client vectors DIRECTORY         checks itself against protocol/vectors
 *   client run ADDRESS ROOTFS        runs a container; ADDRESS as under Transport
 *
 * Says what it did on stdout. The first thing that is not as the page says ends it, with status 1.
 */
#include "message.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdarg.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PORT = 1024, SECONDS = 60 };

#define must(truth) ((truth) ? (void)0 : die("line %d: not so: %s", __LINE__, #truth))

/* ---- the vectors ---- */

static msgpack_object *parts(msgpack_object *message) { return message->via.array.ptr; }

/* "request", "response" or "notification", and the members' names in the order of the array. */
static const char *const FORMS[][4] = {
    {"request", "msgid", "method", "params"},
    {"response", "msgid", "error", "result"},
    {"notification", "method", "params", NULL},
};

static bool means(msgpack_object *message, struct json_object *meaning) {
    const char *const *form = FORMS[parts(message)[0].via.u64];
    struct json_object *fields = member(meaning, form[0]);
    for (unsigned i = 1; i < message->via.array.size; i++) {
        msgpack_object *part = &parts(message)[i];
        if (!strcmp(form[i], "params")) part = &parts(part)[0];
        if (!equals(part, member(fields, form[i]))) return false;
    }
    return fields != NULL;
}

static void encode(msgpack_sbuffer *out, unsigned type, struct json_object *fields) {
    msgpack_packer packer;
    msgpack_packer_init(&packer, out, msgpack_sbuffer_write);
    msgpack_pack_array(&packer, type == 2 ? 3 : 4);
    msgpack_pack_uint64(&packer, type);
    for (unsigned i = 1; i < 4 && FORMS[type][i]; i++) {
        if (!strcmp(FORMS[type][i], "params")) msgpack_pack_array(&packer, 1);
        pack(&packer, member(fields, FORMS[type][i]));
    }
}

static bool encodes_to(struct json_object *meaning, const uint8_t *bytes, size_t size) {
    unsigned type = 0;
    while (!member(meaning, FORMS[type][0])) type++;
    msgpack_sbuffer out;
    msgpack_sbuffer_init(&out);
    encode(&out, type, member(meaning, FORMS[type][0]));
    bool same = out.size == size && !memcmp(out.data, bytes, size);
    msgpack_sbuffer_destroy(&out);
    return same;
}

/* Whole, byte by byte and with bytes behind it: a message ends with its last byte. */
static void check_message(struct json_object *test, unsigned *encoded) {
    const char *name = json_object_get_string(member(test, "name"));
    size_t size, end;
    uint8_t *bytes = unhex(json_object_get_string(member(test, "bytes")), &size);
    msgpack_zone *zone = msgpack_zone_new(MSGPACK_ZONE_CHUNK_SIZE);
    msgpack_object message;
    for (size_t part = 0; part < size; part++)
        if (decode(zone, bytes, part, &end, &message) != PARTIAL) die("%s: not partial at %zu", name, part);
    bytes = realloc(bytes, size + 1);
    bytes[size] = 0xc1;
    if (decode(zone, bytes, size + 1, &end, &message) != WHOLE || end != size) die("%s: is not taken", name);
    if (!means(&message, member(test, "message"))) die("%s: has another meaning", name);
    bool same = encodes_to(member(test, "message"), bytes, size);
    struct json_object *canonical = member(test, "canonical");
    if (same != (!canonical || json_object_get_boolean(canonical))) die("%s: encoded to other bytes", name);
    *encoded += same;
    msgpack_zone_free(zone);
    free(bytes);
}

/* Those that lie in the bytes alone, whatever came before them. */
static void check_fault(struct json_object *test) {
    const char *name = json_object_get_string(member(test, "name"));
    struct json_object *repeat = member(test, "repeat");
    size_t size, more = 0, end;
    uint8_t *bytes = unhex(json_object_get_string(member(test, "bytes")), &size), *again = NULL;
    int count = 0;
    if (repeat) {
        again = unhex(json_object_get_string(json_object_array_get_idx(repeat, 0)), &more);
        count = json_object_get_int(json_object_array_get_idx(repeat, 1));
    }
    bytes = realloc(bytes, size + (size_t)count * more);
    for (int i = 0; i < count; i++, size += more) memcpy(bytes + size, again, more);
    msgpack_zone *zone = msgpack_zone_new(MSGPACK_ZONE_CHUNK_SIZE);
    msgpack_object message;
    for (size_t part = repeat ? size : 0; part <= size; part++) {
        verdict found = decode(zone, bytes, part, &end, &message);
        if (found == BROKEN) break;
        if (found == WHOLE || part == size) die("%s: is not refused", name);
    }
    msgpack_zone_free(zone);
    free(bytes);
    free(again);
}

static int vectors(const char *directory) {
    static const char *const FILES[] = {"requests", "results", "errors", "notifications", "encodings", "faults"};
    unsigned messages = 0, encoded = 0, faults = 0, scenes = 0;
    for (unsigned i = 0; i < sizeof FILES / sizeof *FILES; i++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%s.json", directory, FILES[i]);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        struct json_object *cases = json_object_from_fd_ex(file, 2 * MAX_DEPTH); /* a message, and JSON around it */
        if (!cases) die("%s: %s", path, json_util_get_last_err());
        close(file);
        for (size_t at = 0; at < json_object_array_length(cases); at++) {
            struct json_object *test = json_object_array_get_idx(cases, at);
            if (member(test, "message")) messages++, check_message(test, &encoded);
            else if (member(test, "scene")) scenes++;
            else faults++, check_fault(test);
        }
        json_object_put(cases);
    }
    printf("messages %u encoded %u faults %u scenes %u\n", messages, encoded, faults, scenes);
    return 0;
}

/* ---- a connection ---- */

typedef struct {
    int fd;
    uint64_t msgid;
    size_t size; /* bytes read and not used yet */
    msgpack_zone *zone;
    msgpack_object message; /* the last one, in the zone */
    uint8_t data[2 * MAX_FRAME];
} conn;

static void put(conn *to, const void *data, size_t size) {
    for (ssize_t sent; size; data = (const char *)data + sent, size -= (size_t)sent)
        if ((sent = send(to->fd, data, size, MSG_NOSIGNAL)) < 0) die("send: %s", strerror(errno));
}

/* More bytes into data; false at the end, whether or not it is a reset. */
static bool fill(conn *from) {
    ssize_t got = recv(from->fd, from->data + from->size, sizeof from->data - from->size, 0);
    if (got < 0 && errno != ECONNRESET) die("recv: %s", strerror(errno));
    if (got > 0) from->size += (size_t)got;
    return got > 0;
}

static void drop(conn *from, size_t size) {
    from->size -= size;
    memmove(from->data, from->data + size, from->size);
}

/* Reads the line bytewise: what follows it is the agent's. */
static void handshake(conn *with, unsigned port) {
    char line[32];
    int size = snprintf(line, sizeof line, "CONNECT %u\n", port);
    put(with, line, (size_t)size);
    for (size = 0; size == 0 || line[size - 1] != '\n'; size++)
        if (size == sizeof line || recv(with->fd, line + size, 1, 0) != 1) die("no OK from the VMM");
    if (strncmp(line, "OK ", 3)) die("the VMM said %.*s", size, line);
}

/* A socket connected to the address, whose next byte is the agent's. */
static void dial(conn *with, const char *address) {
    struct timeval limit = {.tv_sec = SECONDS};
    union {
        struct sockaddr any;
        struct sockaddr_un un;
        struct sockaddr_vm vm;
    } to = {.any = {0}};
    unsigned port = PORT;
    bool hybrid = !strncmp(address, "hvsock:", 7);
    if (sscanf(address, "vsock:%u:%u", &to.vm.svm_cid, &port) > 0) {
        to.vm.svm_family = AF_VSOCK;
        to.vm.svm_port = port;
    } else if (hybrid || !strncmp(address, "unix:", 5)) {
        to.un.sun_family = AF_UNIX;
        snprintf(to.un.sun_path, sizeof to.un.sun_path, "%s", strchr(address, ':') + 1);
        char *colon = strrchr(to.un.sun_path, ':');
        if (hybrid && colon && colon[1] && !colon[1 + strspn(colon + 1, "0123456789")]) {
            port = (unsigned)strtoul(colon + 1, NULL, 10);
            *colon = 0;
        }
    } else {
        die("%s: no address", address);
    }
    with->fd = socket(to.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(with->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(with->fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    socklen_t size = to.any.sa_family == AF_UNIX ? sizeof to.un : sizeof to.vm;
    if (connect(with->fd, &to.any, size) < 0) die("%s: %s", address, strerror(errno));
    if (hybrid) handshake(with, port);
}

static void hang_up(conn *gone) {
    close(gone->fd);
    msgpack_zone_free(gone->zone);
    free(gone);
}

static msgpack_object *next_message(conn *from) {
    size_t end;
    verdict found;
    msgpack_zone_clear(from->zone);
    while ((found = decode(from->zone, from->data, from->size, &end, &from->message)) == PARTIAL)
        if (!fill(from)) die("the agent closed");
    if (found == BROKEN) die("the agent broke the contract");
    drop(from, end);
    return parts(&from->message);
}

/* The response, as the array it is; its memory goes with the next message. `format` is the arguments in JSON. */
static msgpack_object *ask(conn *to, const char *method, const char *format, ...) {
    char arguments[8192];
    va_list values;
    va_start(values, format);
    must((size_t)vsnprintf(arguments, sizeof arguments, format, values) < sizeof arguments);
    va_end(values);
    struct json_object *fields = json_object_new_object(), *params = json_tokener_parse(arguments);
    must(json_object_is_type(params, json_type_object));
    json_object_object_add(fields, "msgid", json_object_new_uint64(++to->msgid));
    json_object_object_add(fields, "method", json_object_new_string(method));
    json_object_object_add(fields, "params", params);
    msgpack_sbuffer out;
    msgpack_sbuffer_init(&out);
    encode(&out, 0, fields);
    put(to, out.data, out.size);
    msgpack_sbuffer_destroy(&out);
    json_object_put(fields);
    msgpack_object *answer = next_message(to);
    while (answer[0].via.u64 == 2) answer = next_message(to); /* notifications: none that this client needs */
    must(answer[0].via.u64 == 1 && answer[1].via.u64 == to->msgid);
    return answer;
}

/* The result, or NULL with the error in `error`. */
static const msgpack_object *result_of(const msgpack_object *answer, const char *what) {
    if (answer[2].type == MSGPACK_OBJECT_NIL) return &answer[3];
    const msgpack_object *text = get(&answer[2], "message");
    die("%s: %.*s", what, text ? (int)text->via.str.size : 0, text ? text->via.str.ptr : "");
}

#define call(to, method, ...) result_of(ask(to, method, __VA_ARGS__), method)
#define fails(to, code, method, ...) must(says(&ask(to, method, __VA_ARGS__)[2], "code", code))

static conn *greeted(const char *address) {
    conn *made = calloc(1, sizeof *made);
    must(made && (made->zone = msgpack_zone_new(MSGPACK_ZONE_CHUNK_SIZE)));
    dial(made, address);
    const msgpack_object *welcome =
        call(made, "agent.hello", "{\"protocol_min\": 1, \"protocol_max\": 1, \"client\": \"foreign C\"}");
    must(number(welcome, "protocol") == 1);
    return made;
}

/* ---- a container ---- */

#define STREAM "{\"mode\": \"stream\"}"

/* What a spec must have beside the root and the process: see The least a spec can say. */
#define LEAST                                                                                             \
    "\"ociVersion\": \"1.0.2\", \"mounts\": [{\"destination\": \"/proc\", \"type\": \"proc\", \"source\": \"proc\"}]," \
    "\"linux\": {\"namespaces\": [{\"type\": \"pid\"}, {\"type\": \"ipc\"}, {\"type\": \"uts\"}, {\"type\": \"mount\"}]}"

/* Afterwards the connection is the stream; what came with the answer is in its data. */
static uint64_t attach(conn *with, const char *container, const char *stream) {
    return number(call(with, "stream.attach", "{\"container\": \"%s\", \"stream\": \"%s\"}", container, stream), "offset");
}

/* The program's words come back in capitals, and how many there are: `count` bytes in all. */
static void read_output(conn *from, uint64_t count, const char *input, unsigned lines) {
    const char *wanted = input;
    unsigned line = 0;
    for (uint64_t done = 0; done < count; drop(from, from->size)) {
        if (from->size == 0 && !fill(from)) die("the stream ended after %llu bytes", (unsigned long long)done);
        must(from->size <= count - done);
        done += from->size;
        for (size_t i = 0; i < from->size; i++) {
            must(line < lines && from->data[i] == (uint8_t)*wanted);
            if (*wanted++ == '\n') wanted = input, line++;
        }
    }
    must(line == lines && wanted == input);
}

static void run_to_the_end(const char *address, const char *rootfs, const char *id) {
    static const char LINE[] = "over to you\n";
    enum { LINES = 20000 };
    conn *control = greeted(address), *in = greeted(address), *out = greeted(address);
    const char *create =
        "{\"container\": \"%s\", \"request_id\": \"create-%s\", \"deadline_ms\": 30000, \"labels\": {\"made by\": \"C\"}, \"overlay\": true,"
        " \"stdio\": {\"stdin\": " STREAM ", \"stdout\": " STREAM "},"
        " \"spec\": {" LEAST ", \"root\": {\"path\": \"%s\", \"readonly\": true},"
        "  \"process\": {\"cwd\": \"/\", \"env\": [\"PATH=/usr/bin:/bin\"], \"args\": [\"sh\", \"-c\", \"cat; exit 7\"]}}}";
    uint64_t pid = number(call(control, "container.create", create, id, id, rootfs), "pid");
    must(number(call(in, "container.create", create, id, id, rootfs), "pid") == pid); /* the same request: one */
    fails(control, "ALREADY_EXISTS", "container.create", create, id, "another", rootfs);
    must(attach(in, id, "stdin") == 0 && attach(out, id, "stdout") == 0);
    call(control, "container.start", "{\"container\": \"%s\"}", id);
    call(control, "process.close_stdin", "{\"container\": \"%s\", \"offset\": %zu}", id, LINES * strlen(LINE));
    fails(control, "FAILED_PRECONDITION", "container.delete", "{\"container\": \"%s\"}", id);

    /* Each direction stands still for itself: with nobody reading, the pipes fill up, so write from a child. */
    pid_t writer = fork();
    if (writer == 0) {
        for (int i = 0; i < LINES; i++) put(in, LINE, strlen(LINE));
        _exit(0);
    }
    read_output(out, LINES * strlen(LINE), LINE, LINES);
    const msgpack_object *record = call(control, "container.wait", "{\"container\": \"%s\"}", id);
    must(says(record, "reason", "exited") && number(get(record, "streams"), "stdout") == LINES * strlen(LINE));
    printf("exit_code %u stdout %u\n", (unsigned)number(record, "exit_code"), (unsigned)(LINES * strlen(LINE)));
    int status = 0;
    must(waitpid(writer, &status, 0) == writer && status == 0);
    hang_up(in);
    hang_up(out);
    record = get(call(control, "container.delete", "{\"container\": \"%s\"}", id), "exit");
    must(number(record, "exit_code") == 7);
    hang_up(control);
}

static void see_errors(const char *address, const char *rootfs, const char *id) {
    conn *control = greeted(address);
    fails(control, "NOT_FOUND", "container.state", "{\"container\": \"%s\"}", id);
    fails(control, "UNIMPLEMENTED", "container.juggle", "{}");
    const msgpack_object *answer = ask(
        control, "container.create",
        "{\"container\": \"%s\", \"overlay\": true, \"spec\": {" LEAST ", \"root\": {\"path\": \"%s\"},"
        " \"process\": {\"cwd\": \"/\", \"args\": [\"/no/such/program\"]}}}", id, rootfs);
    must(says(&answer[2], "code", "NOT_FOUND") && says(get(&answer[2], "details"), "exec_error", "not_found"));
    answer = ask(control, "stream.attach", "{\"container\": 5}");
    must(says(&answer[2], "code", "INVALID_ARGUMENT") && says(get(&answer[2], "details"), "field", "container"));
    printf("errors seen\n");

    /* The notification is a courtesy: over hybrid vsock the close may overtake it. */
    put(control, "\xc1", 1);
    while (fill(control)) continue;
    if (control->size || !strncmp(address, "unix:", 5))
        must(says(&next_message(control)[2].via.array.ptr[0], "kind", "malformed"));
    must(control->size == 0);
    printf("breach seen\n");
    hang_up(control);
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "vectors")) return vectors(argv[2]);
    if (argc != 4 || strcmp(argv[1], "run")) die("usage: client vectors DIRECTORY | run ADDRESS ROOTFS");
    char id[64];
    snprintf(id, sizeof id, "foreign-c-%d", (int)getpid());
    run_to_the_end(argv[2], argv[3], id);
    see_errors(argv[2], argv[3], id);
    return 0;
}
