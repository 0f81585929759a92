/* Moves bytes as fast as plain read(2) and write(2) do: the other end of what is measured.
 *
 *   bytes zeros COUNT            COUNT zeros to standard output
 *   bytes drain [COUNT]          reads standard input to its end, or COUNT bytes; prints how many it was
 *   bytes serve PORT COUNT       takes one AF_VSOCK connection after the other. Its first byte says which
 *                                way: 'z', COUNT zeros to it; 'd', COUNT bytes from it, answered by one byte;
 *                                's', COUNT zeros of a child, moved by the two splices the agent makes
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static char buffer[1 << 16];

static long long zeros(int fd, long long count)
{
    long long left = count;
    while (left > 0) {
        ssize_t done = write(fd, buffer, left < (long long)sizeof buffer ? (size_t)left : sizeof buffer);
        if (done < 0 && errno != EINTR)
            return -1;
        left -= done > 0 ? done : 0;
    }
    return count;
}

static long long drain(int fd, long long count)
{
    long long seen = 0;
    while (count < 0 || seen < count) {
        ssize_t done = read(fd, buffer, sizeof buffer);
        if (done < 0 && errno != EINTR)
            return -1;
        if (done == 0)
            break;
        seen += done > 0 ? done : 0;
    }
    return seen;
}

static void relay(int fd, long long count)
{
    int source[2], middle[2];
    ssize_t taken, given;
    pid_t child;
    if (pipe(source) || pipe(middle) || (child = fork()) < 0)
        return perror("relay");
    if (child == 0)
        _exit(zeros(source[1], count) != count);
    close(source[1]);
    fcntl(source[0], F_SETPIPE_SZ, 1 << 18);
    fcntl(middle[0], F_SETPIPE_SZ, 1 << 18);
    while ((taken = splice(source[0], NULL, middle[1], NULL, 1 << 20, 0)) > 0)
        for (; taken > 0; taken -= given)
            if ((given = splice(middle[0], NULL, fd, NULL, (size_t)taken, 0)) <= 0)
                return perror("splice");
    close(source[0]);
    close(middle[0]);
    close(middle[1]);
    waitpid(child, NULL, 0);
}

static int serve(unsigned port, long long count)
{
    struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_port = port, .svm_cid = VMADDR_CID_ANY};
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0), peer;
    if (listener < 0 || bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 1))
        return perror("vsock"), 1;
    printf("listening\n");
    fflush(stdout);
    while ((peer = accept(listener, NULL, NULL)) >= 0) {
        char way, last = 0;
        if (read(peer, &way, 1) != 1)
            perror("way");
        else if (way == 'z')
            zeros(peer, count);
        else if (way == 's')
            relay(peer, count);
        else if (drain(peer, count) != count || write(peer, &last, 1) != 1)
            perror("drain");
        while (read(peer, &last, 1) > 0) /* it closes first: our close could overtake what is under way */
            ;
        close(peer);
    }
    return 1;
}

int main(int argc, char **argv)
{
    long long count = argc > 2 ? atoll(argv[argc - 1]) : -1, done;
    if (argc > 3 && !strcmp(argv[1], "serve"))
        return serve((unsigned)atoi(argv[2]), count);
    if (argc > 2 && !strcmp(argv[1], "zeros"))
        return zeros(1, count) != count;
    if (argc > 1 && !strcmp(argv[1], "drain")) {
        done = drain(0, count);
        printf("%lld\n", done);
        return done < 0 || (count >= 0 && done != count);
    }
    fprintf(stderr, "usage: bytes zeros COUNT | drain [COUNT] | serve PORT COUNT\n");
    return 2;
}
