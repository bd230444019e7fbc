/* What a disk and a clock can do to a process, on demand: an LD_PRELOAD library for the tests.

   A rule names a folder, kinds of system calls, and what happens to some of those calls: an error
   (ENOSPC, EIO, EINTR..), half of a read or a write, a delay, a signal (whose number stands in the
   place of the error), a SIGKILL before, after or in the middle. Calls on other paths are
   untouched. Which calls: the first..last of a rule's, and of those each with a probability that
   depends on its number and the seed alone.

   A rule is a line of text: folder TAB what TAB calls TAB error TAB first TAB last TAB probability
   TAB seed TAB milliseconds. Lines stand in FASTEMBED_FAULTS at the start of a process, or come by
   faults_add() from a process that was forked. Counts go to a shared page (faults_page), where they
   outlive a killed process.

   Not seen: mapped memory (a fault there is a SIGBUS, and cannot be had this way; the mmap call
   itself is), calls that libc makes by itself (fopen), and descriptors that were duplicated. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { MAX_RULES = 8, MAX_FD = 1 << 16, LONGEST = 4096 };

/* The kinds of calls, as bits; their names in rules. */
enum {
  OPEN = 1,   /* of a file that is there, to read it */
  CREATE = 2, /* to write */
  READ = 4,
  WRITE = 8,
  SYNC = 16,
  RENAME = 32, /* and link and symlink: what gives a file its name */
  TRUNCATE = 64,
  UNLINK = 128, /* and rmdir */
  MKDIR = 256,
  MAP = 512
};
static const char* const CALLS[] = {"open",     "create", "read",  "write", "sync", "rename",
                                    "truncate", "unlink", "mkdir", "map",   NULL};

typedef enum { PASS, ERROR, SHORT, DELAY, SIGNAL, KILL_BEFORE, KILL_AFTER, TORN } What;
static const char* const WHATS[] = {"count",       "error",      "short", "delay", "signal",
                                    "kill-before", "kill-after", "torn",  NULL};

typedef struct {
  char folder[LONGEST];
  size_t length;
  What what;
  int calls, error;
  long first, last;
  double probability;
  uint64_t seed;
  long milliseconds;
} Rule;

typedef struct {
  _Atomic long seen[MAX_RULES]; /* calls that a rule is about */
  _Atomic long hit[MAX_RULES];  /* and those that something was done to */
} Page;

static Rule rules[MAX_RULES];
static int rule_count;
static Page own_page, *page = &own_page;
static _Atomic uint8_t files[MAX_FD]; /* by descriptor: a bit for each rule that is about it */
static uint64_t clock_seed;

#define REAL(name)               \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* A number in [0, 1) of a seed and a count: splitmix64. */
static double chance(uint64_t seed, uint64_t count) {
  uint64_t z = seed * 0x9E3779B97F4A7C15u + count * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return (double)((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
}

static int index_of(const char* const* names, const char* name) {
  for (int i = 0; names[i]; i++)
    if (!strcmp(names[i], name)) return i;
  fprintf(stderr, "faults: unknown word %s\n", name);
  abort();
}

/* Adds a rule; its number. Rules stay until faults_clear. */
int faults_add(const char* line) {
  char text[2 * LONGEST], *rest = text, *field[9];
  if (rule_count == MAX_RULES || strlen(line) >= sizeof text) abort();
  strcpy(text, line);
  for (int i = 0; i < 9; i++)
    if (!(field[i] = strsep(&rest, "\t"))) abort();
  Rule* rule = &rules[rule_count];
  snprintf(rule->folder, sizeof rule->folder, "%s", field[0]);
  rule->length = strlen(rule->folder);
  rule->what = (What)index_of(WHATS, field[1]);
  rule->calls = 0;
  for (char* name; (name = strsep(&field[2], ","));) rule->calls |= 1 << index_of(CALLS, name);
  rule->error = atoi(field[3]);
  rule->first = atol(field[4]);
  rule->last = atol(field[5]);
  rule->probability = atof(field[6]);
  rule->seed = strtoull(field[7], NULL, 10);
  rule->milliseconds = atol(field[8]);
  return rule_count++;
}

void faults_clear(void) { rule_count = 0; }
void faults_page(void* shared) { page = shared; }

/* From now on the time of day jumps by up to twelve hours either way, every few readings. */
void faults_clock(uint64_t seed) { clock_seed = seed; }

__attribute__((constructor)) static void start(void) {
  const char* given = getenv("FASTEMBED_FAULTS");
  if (!given) return;
  char *text = strdup(given), *rest = text;
  for (char* line; (line = strsep(&rest, "\n"));)
    if (*line) faults_add(line);
  free(text);
}

/* The rules that are about a path, as bits. */
static uint8_t about(int folder, const char* path) {
  char full[2 * LONGEST];
  uint8_t bits = 0;
  if (!rule_count || !path) return 0;
  if (*path == '/') {
    snprintf(full, sizeof full, "%s", path);
  } else {
    char link[64], place[LONGEST];
    if (folder == AT_FDCWD)
      snprintf(link, sizeof link, "/proc/self/cwd");
    else
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, place, sizeof place - 1);
    if (length < 0) return 0;
    place[length] = 0;
    snprintf(full, sizeof full, "%s/%s", place, path);
  }
  for (int i = 0; i < rule_count; i++)
    if (!strncmp(full, rules[i].folder, rules[i].length) &&
        (full[rules[i].length] == '/' || !full[rules[i].length]))
      bits |= 1u << i;
  return bits;
}

static uint8_t about_file(int fd) { return fd >= 0 && fd < MAX_FD ? files[fd] : 0; }

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* What is to happen to a call: with PASS it goes on as usual. Sleeps and dies where it should. */
static What strike(uint8_t bits, int call) {
  What struck = PASS;
  for (int i = 0; bits >> i; i++) {
    const Rule* rule = &rules[i];
    if (!(bits >> i & 1) || i >= rule_count || !(rule->calls & call)) continue;
    long count = atomic_fetch_add(&page->seen[i], 1) + 1;
    if (rule->what == PASS || count < rule->first || count > rule->last) continue;
    if (rule->probability < 1 && chance(rule->seed, (uint64_t)count) >= rule->probability) continue;
    /* Half of a call that has no halves is all of it. */
    if (rule->what == SHORT && !(call & (READ | WRITE))) continue;
    atomic_fetch_add(&page->hit[i], 1);
    if (rule->what == KILL_BEFORE || (rule->what == TORN && call != WRITE)) die();
    if (rule->what == DELAY) {
      struct timespec time = {rule->milliseconds / 1000, rule->milliseconds % 1000 * 1000000};
      nanosleep(&time, NULL);
      continue;
    }
    if (rule->what == SIGNAL) {
      kill(getpid(), rule->error);
      continue;
    }
    if (rule->what == ERROR) errno = rule->error;
    struck = rule->what;
  }
  return struck;
}

/* A call that is done or not: the error, or the call, and death after it. */
#define WHOLE(bits, call, expression)             \
  do {                                            \
    What what = strike(bits, call);               \
    if (what == ERROR) return -1;                 \
    __typeof__(expression) result = (expression); \
    if (what == KILL_AFTER) die();                \
    return result;                                \
  } while (0)

/* Reads and writes: `count` becomes less. */
#define PARTLY(bits, call, count, expression)                     \
  do {                                                            \
    What what = strike(bits, call);                               \
    if (what == ERROR) return -1;                                 \
    if ((what == SHORT || what == TORN) && count > 1) count /= 2; \
    ssize_t result = (expression);                                \
    if (what == KILL_AFTER || what == TORN) die();                \
    return result;                                                \
  } while (0)

static int opened(int fd, uint8_t bits) {
  if (fd >= 0 && fd < MAX_FD) files[fd] = bits;
  return fd;
}

#define OPENING(name, folder, ...)                                                  \
  mode_t mode = 0;                                                                  \
  if (flags & (O_CREAT | O_TMPFILE)) {                                              \
    va_list list;                                                                   \
    va_start(list, flags);                                                          \
    mode = va_arg(list, mode_t);                                                    \
    va_end(list);                                                                   \
  }                                                                                 \
  REAL(name);                                                                       \
  uint8_t bits = about(folder, path);                                               \
  int call = (flags & O_ACCMODE) == O_RDONLY && !(flags & O_CREAT) ? OPEN : CREATE; \
  WHOLE(bits, call, opened(real(__VA_ARGS__), bits))

int open(const char* path, int flags, ...) { OPENING(open, AT_FDCWD, path, flags, mode); }
int open64(const char* path, int flags, ...) { OPENING(open64, AT_FDCWD, path, flags, mode); }
int openat(int at, const char* path, int flags, ...) { OPENING(openat, at, at, path, flags, mode); }
int openat64(int at, const char* path, int flags, ...) {
  OPENING(openat64, at, at, path, flags, mode);
}

int close(int fd) {
  REAL(close);
  if (fd >= 0 && fd < MAX_FD) files[fd] = 0;
  return real(fd);
}

ssize_t read(int fd, void* data, size_t count) {
  REAL(read);
  PARTLY(about_file(fd), READ, count, real(fd, data, count));
}
ssize_t pread(int fd, void* data, size_t count, off_t at) {
  REAL(pread);
  PARTLY(about_file(fd), READ, count, real(fd, data, count, at));
}
ssize_t pread64(int fd, void* data, size_t count, off64_t at) {
  REAL(pread64);
  PARTLY(about_file(fd), READ, count, real(fd, data, count, at));
}
ssize_t readv(int fd, const struct iovec* parts, int count) {
  REAL(readv);
  PARTLY(about_file(fd), READ, count, real(fd, parts, count));
}
ssize_t preadv(int fd, const struct iovec* parts, int count, off_t at) {
  REAL(preadv);
  PARTLY(about_file(fd), READ, count, real(fd, parts, count, at));
}
ssize_t preadv64(int fd, const struct iovec* parts, int count, off64_t at) {
  REAL(preadv64);
  PARTLY(about_file(fd), READ, count, real(fd, parts, count, at));
}
ssize_t write(int fd, const void* data, size_t count) {
  REAL(write);
  PARTLY(about_file(fd), WRITE, count, real(fd, data, count));
}
ssize_t pwrite(int fd, const void* data, size_t count, off_t at) {
  REAL(pwrite);
  PARTLY(about_file(fd), WRITE, count, real(fd, data, count, at));
}
ssize_t pwrite64(int fd, const void* data, size_t count, off64_t at) {
  REAL(pwrite64);
  PARTLY(about_file(fd), WRITE, count, real(fd, data, count, at));
}
ssize_t writev(int fd, const struct iovec* parts, int count) {
  REAL(writev);
  PARTLY(about_file(fd), WRITE, count, real(fd, parts, count));
}
ssize_t pwritev(int fd, const struct iovec* parts, int count, off_t at) {
  REAL(pwritev);
  PARTLY(about_file(fd), WRITE, count, real(fd, parts, count, at));
}

int fsync(int fd) {
  REAL(fsync);
  WHOLE(about_file(fd), SYNC, real(fd));
}
int fdatasync(int fd) {
  REAL(fdatasync);
  WHOLE(about_file(fd), SYNC, real(fd));
}
int syncfs(int fd) {
  REAL(syncfs);
  WHOLE(about_file(fd), SYNC, real(fd));
}
int rename(const char* from, const char* to) {
  REAL(rename);
  WHOLE(about(AT_FDCWD, to), RENAME, real(from, to));
}
int renameat(int a, const char* from, int b, const char* to) {
  REAL(renameat);
  WHOLE(about(b, to), RENAME, real(a, from, b, to));
}
int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
  REAL(renameat2);
  WHOLE(about(b, to), RENAME, real(a, from, b, to, flags));
}
int link(const char* from, const char* to) {
  REAL(link);
  WHOLE(about(AT_FDCWD, to), RENAME, real(from, to));
}
int linkat(int a, const char* from, int b, const char* to, int flags) {
  REAL(linkat);
  WHOLE(about(b, to), RENAME, real(a, from, b, to, flags));
}
int symlink(const char* target, const char* path) {
  REAL(symlink);
  WHOLE(about(AT_FDCWD, path), RENAME, real(target, path));
}
int symlinkat(const char* target, int at, const char* path) {
  REAL(symlinkat);
  WHOLE(about(at, path), RENAME, real(target, at, path));
}
int ftruncate(int fd, off_t size) {
  REAL(ftruncate);
  WHOLE(about_file(fd), TRUNCATE, real(fd, size));
}
int ftruncate64(int fd, off64_t size) {
  REAL(ftruncate64);
  WHOLE(about_file(fd), TRUNCATE, real(fd, size));
}
int truncate(const char* path, off_t size) {
  REAL(truncate);
  WHOLE(about(AT_FDCWD, path), TRUNCATE, real(path, size));
}
int truncate64(const char* path, off64_t size) {
  REAL(truncate64);
  WHOLE(about(AT_FDCWD, path), TRUNCATE, real(path, size));
}
int unlink(const char* path) {
  REAL(unlink);
  WHOLE(about(AT_FDCWD, path), UNLINK, real(path));
}
int unlinkat(int at, const char* path, int flags) {
  REAL(unlinkat);
  WHOLE(about(at, path), UNLINK, real(at, path, flags));
}
int rmdir(const char* path) {
  REAL(rmdir);
  WHOLE(about(AT_FDCWD, path), UNLINK, real(path));
}
int mkdir(const char* path, mode_t mode) {
  REAL(mkdir);
  WHOLE(about(AT_FDCWD, path), MKDIR, real(path, mode));
}
int mkdirat(int at, const char* path, mode_t mode) {
  REAL(mkdirat);
  WHOLE(about(at, path), MKDIR, real(at, path, mode));
}

void* mmap(void* place, size_t length, int protection, int flags, int fd, off_t at) {
  REAL(mmap);
  if (strike(about_file(fd), MAP) == ERROR) return MAP_FAILED;
  return real(place, length, protection, flags, fd, at);
}
void* mmap64(void* place, size_t length, int protection, int flags, int fd, off64_t at) {
  REAL(mmap64);
  if (strike(about_file(fd), MAP) == ERROR) return MAP_FAILED;
  return real(place, length, protection, flags, fd, at);
}

/* Seconds by which the time of day is wrong now. */
static long jump(void) {
  static _Atomic uint64_t readings;
  if (!clock_seed) return 0;
  uint64_t number = atomic_fetch_add(&readings, 1) / 3;
  return (long)((chance(clock_seed, number) - 0.5) * 86400);
}

int clock_gettime(clockid_t clock, struct timespec* now) {
  REAL(clock_gettime);
  int result = real(clock, now);
  if (!result && clock == CLOCK_REALTIME) now->tv_sec += jump();
  return result;
}
int gettimeofday(struct timeval* restrict now, void* restrict zone) {
  REAL(gettimeofday);
  int result = real(now, zone);
  if (!result) now->tv_sec += jump();
  return result;
}
time_t time(time_t* out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
