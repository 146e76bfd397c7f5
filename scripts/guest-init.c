// SPDX-License-Identifier: MIT
/*
 * The init of the test guest: writes numbered, checksummed blocks, each one on stable storage
 * before the next, and says so on the first serial port. qmpmirror/testing/guest.py is its other
 * half: it writes this command line, reads this log and checks the images. What the two must agree
 * on is marked "as in guest.py".
 *
 * On the kernel command line (guest.py's Workload explains them):
 *   qmpm.disks=vda,vdb qmpm.bs= qmpm.start= qmpm.blocks= qmpm.count= qmpm.ackevery= qmpm.verify=
 *   qmpm.delay= qmpm.run= qmpm.end=idle|poweroff
 *
 * On the serial port, one line each:
 *   start DISKS                           the disks are open, the first write follows
 *   ack N MAX_US                          write N is stable on all disks; longest write so far
 *   error N ERRNO DISK                    a write, flush or read failed; it is tried again
 *   corrupt N DISK SLOT EXPECTED FOUND    a block read back is not the last one written (0: none)
 *   done N                                qmpm.count is reached
 *   fatal REASON                          this guest cannot work
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define COM1 0x3f8
#define MAX_DISKS 8
#define RETRY_US 10000
#define DISK_WAIT_US 30000000
#define GOLDEN 0x9e3779b97f4a7c15ull /* as in guest.py */
#define MAGIC "qmpmblk1"             /* as in guest.py */

typedef unsigned long long u64;

/* As in guest.py; little-endian, followed by the fill and, in the last 8 bytes, the CRC-32. */
struct header {
	char magic[8];
	uint64_t number;
	uint64_t offset;
	uint64_t run;
	uint32_t disk;
	uint32_t size;
};

struct disk {
	char name[16];
	int fd;
};

static struct disk disks[MAX_DISKS];
static unsigned disk_count;
static u64 size, start, blocks, count, ack_every, verify, delay_us, run;
static int bits;           /* log2(blocks) */
static uint64_t *newest;   /* by slot: the number of the last write */
static uint64_t *buffer;   /* one block, aligned for O_DIRECT */
static u64 longest_us;

/* Straight to the port: a tty would hold back up to 4 KiB of acks, and the log must be exact. */
static void say(const char *format, ...)
{
	char line[256];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(line, sizeof(line), format, arguments);
	va_end(arguments);
	for (const char *c = line; *c; c++) {
		while (!(inb(COM1 + 5) & 0x20))
			;
		outb(*c, COM1);
	}
}

static void idle(void)
{
	for (;;)
		pause();
}

static void fatal(const char *what, const char *which)
{
	say("fatal %s %s: %s\n", what, which, strerror(errno));
	idle();
}

/* The value of qmpm.NAME on the kernel command line, or what stands in for it. */
static const char *option(const char *name, const char *otherwise)
{
	static char line[4096], value[256];
	char key[32];

	if (!line[0]) {
		int fd = open("/proc/cmdline", O_RDONLY);

		line[0] = ' ';
		if (fd < 0 || read(fd, line + 1, sizeof(line) - 2) < 0)
			fatal("read", "/proc/cmdline");
		close(fd);
	}
	snprintf(key, sizeof(key), " qmpm.%s=", name);
	char *found = strstr(line, key);
	if (!found)
		return otherwise;
	found += strlen(key);
	snprintf(value, sizeof(value), "%.*s", (int)strcspn(found, " \n"), found);
	return value;
}

static u64 number(const char *name, const char *otherwise)
{
	return strtoull(option(name, otherwise), NULL, 0);
}

static void load_modules(void)
{
	char path[128];
	FILE *list = fopen("/modules/order", "r");

	if (!list)
		fatal("open", "/modules/order");
	while (fscanf(list, "%127s", path) == 1) {
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
			fatal("load", path);
		close(fd);
	}
	fclose(list);
}

static int open_disk(const char *name)
{
	char path[32];
	int fd;

	snprintf(path, sizeof(path), "/dev/%s", name);
	for (int waited = 0; (fd = open(path, O_RDWR | O_DIRECT)) < 0; waited += RETRY_US) {
		if (waited >= DISK_WAIT_US)
			fatal("open", path);
		usleep(RETRY_US);
	}
	return fd;
}

static void open_disks(void)
{
	char names[256];
	u64 bytes;

	snprintf(names, sizeof(names), "%s", option("disks", "vda"));
	for (char *name = strtok(names, ","); name; name = strtok(NULL, ",")) {
		if (disk_count == MAX_DISKS)
			fatal("use", "more than 8 disks");
		struct disk *disk = &disks[disk_count++];
		snprintf(disk->name, sizeof(disk->name), "%s", name);
		disk->fd = open_disk(disk->name);
		if (ioctl(disk->fd, BLKGETSIZE64, &bytes))
			fatal("measure", disk->name);
		errno = ENOSPC;
		if (bytes < (start + blocks) * size)
			fatal("fit the blocks into", disk->name);
	}
}

static void read_options(void)
{
	size = number("bs", "4096");
	start = number("start", "0");
	blocks = number("blocks", "1024");
	count = number("count", "0");
	ack_every = number("ackevery", "1");
	verify = number("verify", "64");
	delay_us = number("delay", "0");
	run = number("run", "1");
	errno = EINVAL;
	if (size < 512 || size & (size - 1))
		fatal("use", "qmpm.bs: no power of two from 512 on");
	if (!blocks || blocks & (blocks - 1))
		fatal("use", "qmpm.blocks: no power of two");
	if (!ack_every)
		fatal("use", "qmpm.ackevery=0");
	bits = __builtin_ctzll(blocks);
	newest = calloc(blocks, sizeof(*newest));
	if (!newest || posix_memalign((void **)&buffer, 4096, size))
		fatal("allocate", "memory");
}

/* The finalizer of splitmix64. As in guest.py. */
static u64 mix(u64 x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

/* Each pass over the region is a permutation of its own. As in guest.py. */
static u64 slot_of(u64 n)
{
	u64 mask = blocks - 1;
	u64 key = mix((n - 1) / blocks + GOLDEN);
	u64 slot = ((n - 1) ^ key) * (key >> 32 | 1) & mask;

	slot ^= slot >> (bits / 2 + 1);
	return slot * GOLDEN & mask;
}

/* CRC-32 as in zlib. */
static uint32_t crc32(const uint8_t *data, size_t length)
{
	static uint32_t table[256];
	uint32_t crc = ~0u;

	for (uint32_t i = 0; !table[255] && i < 256; i++) {
		table[i] = i;
		for (int bit = 0; bit < 8; bit++)
			table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320u : 0);
	}
	while (length--)
		crc = crc >> 8 ^ table[(crc ^ *data++) & 0xff];
	return ~crc;
}

/* As in guest.py. The fill tells from any sector alone which write of which disk it belongs to. */
static void make_block(u64 n, unsigned disk)
{
	struct header header = {
		.magic = MAGIC,
		.number = n,
		.offset = (start + slot_of(n)) * size,
		.run = run,
		.disk = disk,
		.size = size,
	};
	u64 seed = (n << 8 | disk) * GOLDEN;
	size_t words = size / 8;

	memcpy(buffer, &header, sizeof(header));
	for (size_t i = sizeof(header) / 8; i < words - 1; i++)
		buffer[i] = seed + i;
	buffer[words - 1] = crc32((uint8_t *)buffer, size - 8);
}

static u64 now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000ull + now.tv_nsec / 1000;
}

/* What pread and pwrite returned, as one truth: all of the block or an errno. */
static int whole(ssize_t done)
{
	if (done >= 0 && (u64)done != size)
		errno = EIO;
	return done == (ssize_t)size;
}

static void write_block(u64 n, unsigned index)
{
	int fd = disks[index].fd;
	off_t offset = (start + slot_of(n)) * size;

	make_block(n, index);
	for (;;) {
		u64 begun = now_us();
		int stable = whole(pwrite(fd, buffer, size, offset)) && !fdatasync(fd);
		int problem = errno;
		u64 took = now_us() - begun;

		if (took > longest_us)
			longest_us = took;
		if (stable)
			return;
		say("error %llu %d %s\n", n, problem, disks[index].name);
		usleep(RETRY_US);
	}
}

/* The number of the valid block in the buffer, 0 when there is none. */
static u64 number_in_buffer(u64 slot, unsigned index)
{
	struct header *header = (struct header *)buffer;

	if (memcmp(header->magic, MAGIC, 8) || header->offset != (start + slot) * size ||
	    header->run != run || header->disk != index || header->size != size ||
	    buffer[size / 8 - 1] != crc32((uint8_t *)buffer, size - 8))
		return 0;
	return header->number;
}

/* Reads the block of some earlier write: a disk switched to a wrong image shows here. */
static void verify_block(u64 n, unsigned index)
{
	u64 slot = slot_of(mix(n) % n + 1);

	while (!whole(pread(disks[index].fd, buffer, size, (start + slot) * size))) {
		say("error %llu %d %s\n", n, errno, disks[index].name);
		usleep(RETRY_US);
	}
	u64 found = number_in_buffer(slot, index);
	if (found != newest[slot])
		say("corrupt %llu %s %llu %llu %llu\n", n, disks[index].name, slot,
		    (u64)newest[slot], found);
}

static void write_blocks(void)
{
	for (u64 n = 1; !count || n <= count; n++) {
		for (unsigned i = 0; i < disk_count; i++)
			write_block(n, i);
		newest[slot_of(n)] = n;
		if (n % ack_every == 0 || n == count)
			say("ack %llu %llu\n", n, longest_us);
		for (unsigned i = 0; verify && n % verify == 0 && i < disk_count; i++)
			verify_block(n, i);
		if (delay_us)
			usleep(delay_us);
	}
}

int main(void)
{
	ioperm(COM1, 8, 1);
	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	if (mount("devtmpfs", "/dev", "devtmpfs", 0, "") || mount("proc", "/proc", "proc", 0, "") ||
	    mount("sysfs", "/sys", "sysfs", 0, ""))
		fatal("mount", "/dev, /proc and /sys");
	load_modules();
	read_options();
	open_disks();
	say("start %s\n", option("disks", "vda"));
	write_blocks();
	say("done %llu\n", count);
	if (!strcmp(option("end", "idle"), "poweroff"))
		reboot(RB_POWER_OFF);
	idle();
}
