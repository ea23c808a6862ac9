/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Lists a directory with all that readdir(3) has to say: name, inode number, type. */
#include <dirent.h>
#include <stdio.h>

int main(int argc, char **argv)
{
	struct dirent *entry;
	DIR *directory;

	if (argc != 2)
		return 2;
	directory = opendir(argv[1]);
	if (!directory)
		return 1;
	while ((entry = readdir(directory)))
		printf("%s %llu %s\n", entry->d_name, (unsigned long long)entry->d_ino,
		       entry->d_type == DT_DIR   ? "dir"
		       : entry->d_type == DT_REG ? "reg"
						 : "?");
	return closedir(directory) < 0;
}
